#include "shell/launch.h"

#include "core/base/error.h"

#include <fcntl.h>
#include <malloc.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <utility>

namespace moe::shell {
namespace {
constexpr const char *kTerminalVariable = "MOELAB_RANKS_TERMINAL", *kRankVariable = "MOELAB_RANK_PROCESS";

/// Cores that this process may use, hyperthreads of one core counted once.
int physical_cores() {
    cpu_set_t allowed;
    int logical = sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
    std::set<std::pair<int, int>> cores;
    std::ifstream info("/proc/cpuinfo");
    int socket = 0;
    for (std::string line; std::getline(info, line);) {
        size_t colon = line.find(':');
        if (colon == std::string::npos) continue;
        if (line.starts_with("physical id")) socket = std::atoi(line.c_str() + colon + 1);
        if (line.starts_with("core id")) cores.emplace(socket, std::atoi(line.c_str() + colon + 1));
    }
    return std::max(1, cores.empty() ? logical : std::min(logical, int(cores.size())));
}

int environment_integer(std::initializer_list<const char*> names, int fallback) {
    for (const char* name : names) {
        if (const char* text = std::getenv(name); text && *text) return std::atoi(text);
    }
    return fallback;
}
}  // namespace

void keep_memory() {
    mallopt(M_MMAP_MAX, 0);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
    mallopt(M_TOP_PAD, 64 << 20);
}

void know_own_ranks() {
    std::string own = std::to_string(getpid());
    if (const char* rank = std::getenv(kRankVariable); rank && rank != own) {
        std::vector<std::string> names;
        for (char** variable = environ; *variable; ++variable) {
            std::string_view name = std::string_view(*variable).substr(0, std::string_view(*variable).find('='));
            for (std::string_view prefix : {"OMPI_", "PMIX_", "PMI_", "ORTE_"})
                if (name.starts_with(prefix)) names.emplace_back(name);
        }
        for (auto& name : names) unsetenv(name.c_str());
        unsetenv(kRankVariable);
    }
    if (environment_integer({"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}, 1) > 1) setenv(kRankVariable, own.c_str(), 1);
}

int choose_threads(int wanted) {
    if (wanted > 0) return wanted;
    if (int given = environment_integer({"OMP_NUM_THREADS"}, 0); given > 0) return given;
    int ranks_here = environment_integer({"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"}, 1);
    return std::max(1, physical_cores() / std::max(1, ranks_here));
}

int launched_rank() {
    const char* backend = std::getenv("MOELAB_BACKEND");      // as dist::launched_with_ranks: plain srun tasks are runs of their own
    if (backend && std::string_view(backend) == "mpi") return environment_integer({"OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"}, 0);
    return environment_integer({"OMPI_COMM_WORLD_RANK", "PMI_RANK"}, 0);
}

std::vector<std::string> rank_command(int ranks, const std::vector<std::string>& arguments) {
    std::string self = std::filesystem::read_symlink("/proc/self/exe").native();
    std::vector<std::string> words = {"mpirun", "--quiet", "--oversubscribe", "--mca", "btl", "self,vader", "--mca", "mpi_yield_when_idle", "1", "--bind-to", "none", "-n", std::to_string(ranks), self};
    words.insert(words.end(), arguments.begin(), arguments.end());
    return words;
}

ForegroundOfRanks::ForegroundOfRanks() {
    bool asked = std::getenv(kTerminalVariable);
    unsetenv(kTerminalVariable);                            // not for what this starts
    if (!asked || launched_rank() > 0) return;
    terminal_ = open("/dev/tty", O_RDWR | O_CLOEXEC);
    if (terminal_ < 0) return;
    std::signal(SIGTTOU, SIG_IGN);                          // or taking it would stop this process
    std::signal(SIGTSTP, SIG_IGN);                          // nobody could continue it: the shell waits for the launcher
    group_before_ = tcgetpgrp(terminal_);
    tcsetpgrp(terminal_, getpgrp());
    for (int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) dup2(terminal_, stream);
}

ForegroundOfRanks::~ForegroundOfRanks() {
    if (terminal_ < 0) return;
    std::fflush(stdout);
    if (group_before_ > 0) tcsetpgrp(terminal_, group_before_);
    close(terminal_);
}

void become_ranks(int ranks, const std::vector<std::string>& arguments, bool gives_terminal) {
    if (gives_terminal) {
        setenv(kTerminalVariable, "1", 1);
        if (int nothing = open("/dev/null", O_RDONLY); nothing >= 0) dup2(nothing, STDIN_FILENO);
    }
    auto words = rank_command(ranks, arguments);
    std::vector<char*> list;
    for (auto& word : words) list.push_back(word.data());
    list.push_back(nullptr);
    // mpirun refuses to run as root otherwise; containers often have no other user.
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
    execvp("mpirun", list.data());
    MOE_THROW(dist, "mpirun", std::strerror(errno), "Open MPI's launcher on the PATH", "install openmpi-bin, or start the ranks yourself: mpirun -n N moelab run FILE.lua");
}
}  // namespace moe::shell
