#pragma once

#include <string>
#include <vector>

extern std::vector<std::string> launches;  // names of the launchers that were called
