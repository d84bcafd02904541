#include "core/base/error.h"
#include "core/base/json.h"
#include "core/base/log.h"
#include "tests/catch.h"

#include <unistd.h>

#include <filesystem>

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
