#include "core/base/json.h"
#include "tests/catch.h"

#include <nlohmann/json.hpp>
#include <unistd.h>

#include <filesystem>
#include <fstream>

using namespace moe;
using nlohmann::json;
namespace fs = std::filesystem;

namespace {
std::string message(const std::string& text) {
    try {
        parse_json(text, "f.json");
    } catch (const Error& e) {
        return e.what();
    }
    return "";
}

struct Folder {
    fs::path path = fs::temp_directory_path() / ("moe_json_" + std::to_string(::getpid()));
    Folder() { fs::create_directories(path); }
    ~Folder() { fs::remove_all(path); }
};
}  // namespace

TEST_CASE("json: comments are allowed", "[base][json]") {
    CHECK(parse_json("// a\n{\"x\": /* b */ 1}", "f.json") == json{{"x", 1}});
}

TEST_CASE("json: malformed text names the file, line and column", "[base][json]") {
    CHECK(message("{\"a\": 1,\n \"b\": }\n").find("f.json:2:7:") == 0);
    CHECK(message("x").find("f.json:1:1:") == 0);
    CHECK(message("{\"a\": 1\n\n\n").find("f.json:4:") == 0);
    CHECK(message("").find("f.json:1:1:") == 0);
    CHECK(message("{\"a\": 1} trailing").find("f.json:1:1") == 0);
    try {
        parse_json("[1,\n2", "f.json", ErrorKind::config);
        FAIL("no error");
    } catch (const Error& e) {
        CHECK(e.kind() == ErrorKind::config);
        CHECK(e.parts().where == "f.json:2");
    }
}

TEST_CASE("json: a key given twice in one object is an error, in two objects it is not", "[base][json]") {
    CHECK(message("{\"a\": 1, \"a\": 1}").find("\"a\" twice") != std::string::npos);
    CHECK(message("{\"a\": {\"a\": 1}, \"b\": [{\"a\": 1}, {\"a\": 2}]}").empty());
}

TEST_CASE("json: files that are missing, or are folders, are io errors that name the path", "[base][json]") {
    Folder folder;
    for (std::string path : {folder.path.string() + "/none.json", folder.path.string()}) {
        try {
            read_json(path);
            FAIL("no error");
        } catch (const Error& e) {
            CHECK(e.kind() == ErrorKind::io);
            CHECK(e.parts().op == path);
        }
    }
}

TEST_CASE("json: write_text replaces a file as a whole and leaves nothing else behind", "[base][json]") {
    Folder folder;
    std::string path = (folder.path / "a.txt").string();
    write_text(path, "one");
    write_text(path, std::string("t\0wo", 4));
    CHECK(read_text(path) == std::string("t\0wo", 4));
    CHECK(std::distance(fs::directory_iterator(folder.path), {}) == 1);
    CHECK_THROWS_AS(write_text((folder.path / "no" / "a.txt").string(), "x"), Error);
}

TEST_CASE("json: write_text reports a full disk", "[base][json]") {
    if (!fs::exists("/dev/full")) return;
    try {
        write_text("/dev/full", "x");
        FAIL("no error");
    } catch (const Error& e) {
        CHECK(e.kind() == ErrorKind::io);
        CHECK(std::string(e.what()).find("No space left") != std::string::npos);
    }
    CHECK_FALSE(fs::is_regular_file("/dev/full"));
}

TEST_CASE("json: brief shortens without cutting a character", "[base][json]") {
    CHECK(brief(json{1, 2}) == "[1,2]");
    std::string text = brief(json(std::string("äöüäöüäöü")), 8);
    CHECK(json::parse("\"" + text.substr(1) + "\"").is_string());      // valid UTF-8
    CHECK(text.ends_with("…"));
}
