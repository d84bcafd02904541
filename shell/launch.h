// How a process of moelab starts: memory settings, threads, several ranks.
#pragma once
#include <string>
#include <vector>

namespace moe::shell {

/// glibc gives large blocks back to the system after each step and faults them in again at the next: keep them instead.
void keep_memory();

/// For the start of the program: what a rank starts is no rank, although it inherits the launcher's variables.
void know_own_ranks();

/// Threads for one rank: `wanted` where it is positive, else OMP_NUM_THREADS, else this rank's share of the physical cores.
int choose_threads(int wanted);

/// The words that start `ranks` copies of this program with these arguments: mpirun and its options.
std::vector<std::string> rank_command(int ranks, const std::vector<std::string>& arguments);

/// Becomes that command. `gives_terminal`: rank 0 is to have the terminal (ForegroundOfRanks) and the launcher no input: what mpirun passes on is a
/// pipe, and its own Ctrl-C ends the ranks. Returns only by throwing moe::Error (dist).
[[noreturn]] void become_ranks(int ranks, const std::vector<std::string>& arguments, bool gives_terminal);

/// While it lives, rank 0 of ranks that were started so is the terminal's foreground, with standard input, output and error there. Else nothing.
class ForegroundOfRanks {
public:
    ForegroundOfRanks();
    ~ForegroundOfRanks();
    ForegroundOfRanks(const ForegroundOfRanks&) = delete;

private:
    int terminal_ = -1, group_before_ = -1;
};

/// Rank of this process among those that a launcher started, 0 for a single one.
int launched_rank();

}  // namespace moe::shell
