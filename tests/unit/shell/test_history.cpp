#include "shell/history.h"
#include "tests/catch.h"
#include "tests/folder.h"

#include <thread>

using moe::shell::History;

TEST_CASE("history: inputs come back in the next session, each once, lines and backslashes kept", "[shell]") {
    moe::test::Folder folder;
    std::string path = folder / "deep/history";
    {
        History h(path);
        for (const char* input : {"a = 1", "for i = 1, 2 do\n  print('\\n')\nend", "  ", "a = 1", "a = 1", "b\\"}) h.add(input);
        CHECK(h.entries() == std::vector<std::string>{"for i = 1, 2 do\n  print('\\n')\nend", "a = 1", "b\\"});
    }
    CHECK(History(path).entries() == std::vector<std::string>{"for i = 1, 2 do\n  print('\\n')\nend", "a = 1", "b\\"});
}

TEST_CASE("history: two shells append to one file, and none loses an input", "[shell]") {
    moe::test::Folder folder;
    std::string path = folder / "history";
    auto type = [&](const std::string& who) {
        History h(path);
        for (int i = 0; i < 200; ++i) h.add(who + std::to_string(i));
    };
    std::thread other(type, "a");
    type("b");
    other.join();
    CHECK(History(path).entries().size() == 400);
}

TEST_CASE("history: the file is limited", "[shell]") {
    moe::test::Folder folder;
    std::string path = folder / "history";
    {
        History h(path, 10);
        for (int i = 0; i < 40; ++i) h.add(std::to_string(i));
    }
    History h(path, 10);
    REQUIRE(h.entries().size() == 10);
    CHECK(h.entries().back() == "39");
    CHECK(History(path, 100).entries().size() == 10);
    CHECK(h.problem().empty());
    History nowhere("/proc/nowhere/history");
    CHECK(!nowhere.problem().empty());
    nowhere.add("x");
    CHECK(nowhere.entries().size() == 1);
}
