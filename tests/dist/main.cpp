// Catch2's main on several ranks: every rank runs all cases in the same order; ranks other than 0 print only if they fail; the
// exit code is nonzero on all ranks if any of them fails. A hang ends by a signal: waiting ranks poll, so
// processor time tells one from a machine that is busy with something else.
#define CATCH_CONFIG_RUNNER
#include "tests/catch.h"

#include "core/dist/group.h"

#include <sys/time.h>
#include <unistd.h>

#include <cstdio>
#include <iostream>

namespace {
constexpr int kProcessorSecs = 60;

/// Standard output into a file without a name while it lives.
class Quiet {
public:
    Quiet() : kept_(dup(STDOUT_FILENO)), file_(std::tmpfile()) {
        if (file_) dup2(fileno(file_), STDOUT_FILENO);
    }
    void end(bool show) {
        std::cout.flush();
        std::fflush(stdout);
        dup2(kept_, STDOUT_FILENO);
        if (!show || !file_) return;
        std::rewind(file_);
        for (int c; (c = std::fgetc(file_)) != EOF;) std::fputc(c, stderr);
    }

private:
    int kept_;
    std::FILE* file_;
};
}  // namespace

int main(int argc, char** argv) {
    itimerval limit{{0, 0}, {kProcessorSecs, 0}};
    setitimer(ITIMER_PROF, &limit, nullptr);
    const auto& world = moe::dist::world();
    if (world.size() == 1) {
        std::fprintf(stderr, "%s: one rank, want several (mpirun -n 2 …)\n", argv[0]);
        return 2;
    }
    int failed = 1;
    if (world.rank() == 0) {
        failed = Catch::Session().run(argc, argv);
    } else {
        Quiet quiet;
        failed = Catch::Session().run(argc, argv);
        quiet.end(failed != 0);
    }
    return world.all_reduce(int64_t(failed != 0), moe::dist::ReduceOp::max) != 0;
}
