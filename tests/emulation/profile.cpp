// A model of the cost of memory accesses: the k-th execution of an instruction by the lanes of a warp is one request.
//
// Shared memory has 32 banks of 4 bytes. A request takes as many wavefronts as the largest number of different words in
// one bank; a request for more than 128 bytes is split into groups of 32 lanes of 4 bytes, 16 of 8 or 8 of 16. Global
// memory is accessed in sectors of 32 bytes. Access widths are those of the CPU's compiler, so this is no measurement.
#include "runtime.hpp"

#include <algorithm>
#include <deque>
#include <map>
#include <set>
#include <tuple>

namespace emulated {

static Runtime& g = runtime;

namespace {

struct Request {
    unsigned lanes;
    uintptr_t address[32];
};

// The requests of one warp that are still incomplete; `first` is the number of the oldest one.
struct Open {
    std::deque<Request> requests;
    uint64_t first, count[32];
};

struct Place {
    const void* pc;
    int part;  // index within an access of more than 16 bytes, which a GPU splits
    bool shared;
    bool operator<(const Place& other) const {
        return std::tie(pc, part, shared) < std::tie(other.pc, other.part, other.shared);
    }
};

struct Site {
    int kind;
    size_t bytes;
    uint64_t requests, cost, least;
    Open open[MOST_WARPS];
};

std::map<Place, Site> sites;

// Returns the wavefronts of a request, and their number without bank conflicts.
std::pair<uint64_t, uint64_t> wavefronts(const Request& request, size_t bytes) {
    const int group = bytes <= 4 ? 32 : int(128 / bytes);
    uint64_t cost = 0, least = 0;
    for (int first = 0; first < 32; first += group) {
        std::set<uintptr_t> words[32];
        size_t most = 0;
        for (int lane = first; lane < first + group; ++lane)
            if (request.lanes >> lane & 1)
                for (uintptr_t w = request.address[lane] / 4; w <= (request.address[lane] + bytes - 1) / 4; ++w) {
                    words[w % 32].insert(w);
                    most = std::max(most, words[w % 32].size());
                }
        cost += most;
        least += most != 0;
    }
    return {cost, least};
}

// Returns the sectors of a request, and the fewest sectors that hold its distinct bytes.
std::pair<uint64_t, uint64_t> sectors(const Request& request, size_t bytes) {
    std::set<uintptr_t> touched, pieces;
    for (int lane = 0; lane < 32; ++lane)
        if (request.lanes >> lane & 1) {
            const uintptr_t a = request.address[lane];
            pieces.insert(a);
            for (uintptr_t s = a / 32; s <= (a + bytes - 1) / 32; ++s) touched.insert(s);
        }
    return {touched.size(), (pieces.size() * bytes + 31) / 32};
}

void close(Site& site, const Place& place, const Request& request) {
    const auto [cost, least] = place.shared ? wavefronts(request, site.bytes) : sectors(request, site.bytes);
    ++site.requests;
    site.cost += cost;
    site.least += least;
}

}  // namespace

static void profile_part(uintptr_t a, size_t bytes, int kind, Place place, int thread) {
    Site& site = sites[place];
    site.kind = kind;
    site.bytes = std::max(site.bytes, bytes);
    Open& open = site.open[thread / 32];
    const uint64_t number = open.count[thread % 32]++ - open.first;
    if (number >= open.requests.size()) open.requests.resize(number + 1);
    Request& request = open.requests[number];
    request.lanes |= 1u << thread % 32;
    request.address[thread % 32] = a;
    if (number == 0 && request.lanes == ~0u) {
        close(site, place, request);
        open.requests.pop_front();
        ++open.first;
    }
}

void profile_access(const void* address, size_t bytes, int kind, bool shared, const void* pc, int thread) {
    for (size_t done = 0; done < bytes; done += 16)
        profile_part(uintptr_t(address) + done, std::min<size_t>(bytes - done, 16), kind, {pc, int(done / 16), shared}, thread);
}

// At the end of a block no further lane can join a request.
void profile_block_end() {
    for (auto& [place, site] : sites)
        for (Open& open : site.open) {
            for (const Request& request : open.requests)
                if (request.lanes) close(site, place, request);
            open = {};
        }
}

void profile_start() { sites.clear(); }

// Returns one line per instruction: address, memory, kind, width, requests, cost, least cost.
std::string profile_text() {
    std::string text;
    for (const auto& [place, site] : sites) {
        static const char* const verbs[] = {"read", "write", "atomic"};
        char line[160];
        snprintf(line, sizeof line, "%#zx %s %s %zu %zu %zu %zu\n", size_t(uintptr_t(place.pc) - g.library->low),
                 place.shared ? "shared" : "global", verbs[site.kind], site.bytes, size_t(site.requests), size_t(site.cost),
                 size_t(site.least));
        text += line;
    }
    return text;
}

}  // namespace emulated
