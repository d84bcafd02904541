#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/log.h"
#include "tests/catch.h"

#include <unistd.h>

#include <fcntl.h>

#include <cstdio>
#include <filesystem>
#include <functional>
#include <thread>

using namespace moe;

TEST_CASE("log: the file gets the messages from its level on, with a time", "[base][log]") {
    auto path = std::filesystem::temp_directory_path() / ("moe_log_" + std::to_string(::getpid()));
    log::set_file(path.string());
    log::set_level("error");
    log::warn("not this one");
    log::error("this one, from the log's own test");
    log::set_file("");
    log::set_level("info");
    std::string text = read_text(path.string());
    std::filesystem::remove(path);
    CHECK(text.find("error: this one") != std::string::npos);
    CHECK(text.find("not this one") == std::string::npos);
    CHECK(text.substr(0, 2) == "20");
}

TEST_CASE("log: a file that cannot be written and an unknown level are errors", "[base][log]") {
    CHECK_THROWS_AS(log::set_file("/no/such/folder/log.txt"), Error);
    CHECK_THROWS_AS(log::set_level("loud"), Error);
}

namespace {
/// What f writes to standard output.
std::string written(const std::function<void()>& f) {
    auto path = std::filesystem::temp_directory_path() / ("moe_out_" + std::to_string(::getpid()));
    std::fflush(stdout);
    int kept = dup(STDOUT_FILENO), file = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY, 0600);
    dup2(file, STDOUT_FILENO);
    f();
    std::fflush(stdout);
    dup2(kept, STDOUT_FILENO);
    close(kept);
    close(file);
    std::string text = read_text(path.string());
    std::filesystem::remove(path);
    return text;
}
}  // namespace

TEST_CASE("log: a prompt stays below what other threads print, whole lines at a time", "[base][log]") {
    CHECK(written([] {
        log::prompt("> ab", "<");
        log::print("half ");
        std::thread([] { log::print("line\nmore"); }).join();
        log::prompt("> abc", "<");
        log::prompt("> abc\n", "");
        log::print("after\n");
    }) == "> ab" "<half line\n> ab" "<> abc" "<> abc\n" "more" "after\n");
}
