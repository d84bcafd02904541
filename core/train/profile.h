// Where the time of a piece of work goes, from LibTorch's own recorder: kernels on a GPU, operators on a CPU, and phases.
#pragma once
#include <functional>
#include <string>
#include <vector>

namespace moe::train {

/// The calls of one name.
struct ProfileRow {
    std::string name;
    int64_t count = 0;
    double secs = 0;                              ///< on a GPU of the kernels, else of operators without those that they call
};
/// Most costly first.
struct Profile {
    std::vector<ProfileRow> kernels;              ///< GPU: kernels, copies, fills; CPU: operators by their own time
    std::vector<ProfileRow> calls;                ///< of the CUDA runtime and driver, by the host's time in them: launches, waits, allocations
    std::vector<ProfileRow> phases;               ///< the ranges opened by Phase: GPU: of the kernels launched in them; CPU: from start to end
    double wall_secs = 0, busy_secs = 0;          ///< of the work; of the GPU's kernels (CPU: 0)
};

/// Records `work` and everything that it launches; waits for the GPU at both ends. Costs a few microseconds an operator, so the wall time
/// is above an unrecorded one. What `work` throws passes through, the recorder is off afterwards. Not to be nested.
Profile profile(const std::function<void()>& work);

}  // namespace moe::train
