// Which capability's passes this machine runs.
#pragma once

#include <string>
#include <vector>

#include "rhythm/passes.h"

namespace rhythm {

// What was compiled, the best last.
std::vector<const Passes*> compiled_passes();

// Of those, what this processor can execute.
bool runs_here(const Passes& passes);

// The best that runs here, or the one that `requested` names; null if that one was not compiled or cannot run here.
const Passes* choose_passes(const char* requested);

} // namespace rhythm
