#pragma once  // what it declares is in cupy.hpp
