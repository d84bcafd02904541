// Catch2's main for every unit test executable; test files include "tests/catch.h".
//
// With MOELAB_TEST_REPORT=FILE each finished test case also appends a line "passed|failed|skipped <name>" to it, which is what
// ./moelab test counts. A case is skipped when it says so on stdout: a line that starts with "skipped:". Reading that back needs
// stdout to be a file, as it is under the launcher.
#define CATCH_CONFIG_MAIN
#include "tests/catch.h"

#include <fcntl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <string>

namespace {

#ifdef MOE_CATCH2_3
using ListenerBase = Catch::EventListenerBase;
#else
using ListenerBase = Catch::TestEventListenerBase;
#endif

// Where stdout stands, −1 where it is no file.
off_t stdout_position() {
    std::cout.flush();
    std::fflush(stdout);
    return ::lseek(STDOUT_FILENO, 0, SEEK_CUR);
}

// What was written to stdout from `begin` to `end`. The descriptor itself is write-only, hence the second one.
std::string stdout_between(off_t begin, off_t end) {
    if (begin < 0 || end <= begin) return {};
    const int file = ::open("/proc/self/fd/1", O_RDONLY);
    if (file < 0) return {};
    std::string text(static_cast<size_t>(end - begin), '\0');
    const ssize_t count = ::pread(file, text.data(), text.size(), begin);
    ::close(file);
    text.resize(count > 0 ? static_cast<size_t>(count) : 0);
    return text;
}

class Report : public ListenerBase {
public:
    using ListenerBase::ListenerBase;

    void testCaseStarting(const Catch::TestCaseInfo& info) override {
        ListenerBase::testCaseStarting(info);
        begin_ = stdout_position();
        name_ = info.name;
        note("started", name_);
    }

    void testCaseEnded(const Catch::TestCaseStats& stats) override {
        ListenerBase::testCaseEnded(stats);
        const bool failed = stats.totals.testCases.failed > 0;
        const std::string text = "\n" + stdout_between(begin_, stdout_position());
        const bool skipped = was_skipped(stats) || text.find("\nskipped:") != std::string::npos;
        note(failed ? "failed" : skipped ? "skipped" : "passed", name_);
    }

private:
    // Only Catch2 3 has and counts SKIP().
    template <typename Stats>
    static bool was_skipped(const Stats& stats) {
        if constexpr (requires { stats.totals.testCases.skipped; }) {
            return stats.totals.testCases.skipped > 0;
        } else {
            return false;
        }
    }

    static void note(const char* what, const std::string& name) {
        if (const char* path = std::getenv("MOELAB_TEST_REPORT")) std::ofstream(path, std::ios::app) << what << ' ' << name << std::endl;
    }

    off_t begin_ = -1;
    std::string name_;
};

}  // namespace

CATCH_REGISTER_LISTENER(Report)
