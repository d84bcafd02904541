// How a process of moelab starts: memory settings, threads, several ranks.
#pragma once
#include <string>
#include <vector>

namespace moe::shell {

/// glibc gives large blocks back to the system after each step and faults them in again at the next: keep them instead.
void keep_memory();

/// Threads for one rank: `wanted` where it is positive, else OMP_NUM_THREADS, else this rank's share of the physical cores.
int choose_threads(int wanted);

/// The words that start `ranks` copies of this program with these arguments: mpirun and its options.
std::vector<std::string> rank_command(int ranks, const std::vector<std::string>& arguments);

/// Becomes that command. Returns only by throwing moe::Error (dist).
[[noreturn]] void become_ranks(int ranks, const std::vector<std::string>& arguments);

/// Rank of this process among those that a launcher started, 0 for a single one.
int launched_rank();

}  // namespace moe::shell
