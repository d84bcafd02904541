#include "core/base/error.h"
#include "core/base/problem.h"
#include "tests/catch.h"

using namespace moe;

TEST_CASE("error: what() says the operation, got, want and hint", "[base][error]") {
    try {
        MOE_CHECK(1 + 1 == 3, shape, "matmul", "[4, 8] x [4, 8]", "a.size(1) == b.size(0)", "transpose one");
        FAIL("no error");
    } catch (const Error& e) {
        CHECK(std::string(e.what()) == "matmul: got [4, 8] x [4, 8], want a.size(1) == b.size(0) (transpose one)");
        CHECK(e.kind() == ErrorKind::shape);
        CHECK(e.parts().op == "matmul");
        CHECK(e.parts().where.find("test_error.cpp:") != std::string::npos);
    }
}

TEST_CASE("error: a message inside of a message stays as it is", "[base][error]") {
    CHECK(std::string(Error({ErrorKind::config, "sweep", "1 point that cannot run: lr: got -1, want more", "", "", "", -1, ""}).what()) == "sweep: got 1 point that cannot run: lr: got -1, want more");
}

TEST_CASE("error: the texts of a check that holds are never made", "[base][error]") {
    int made = 0;
    auto text = [&] { return ++made, std::string("x"); };
    MOE_CHECK(true, internal, text(), text(), text(), text());
    CHECK(made == 0);
}

TEST_CASE("error: exit codes are 2 for wrong use, 130 for an interrupt and 1 for the rest", "[base][error]") {
    auto code = [](ErrorKind kind) { return Error({kind, "op", "", "", "", "", -1, ""}).exit_code(); };
    CHECK(code(ErrorKind::usage) == 2);
    CHECK(code(ErrorKind::config) == 2);
    CHECK(code(ErrorKind::interrupted) == 130);
    CHECK(code(ErrorKind::io) == 1);
    CHECK(code(ErrorKind::internal) == 1);
}

TEST_CASE("error: every kind has a name of its own", "[base][error]") {
    CHECK(std::string(to_string(ErrorKind::usage)) == "usage");
    CHECK(std::string(to_string(ErrorKind::dist)) == "dist");
    CHECK(std::string(to_string(ErrorKind::internal)) == "internal");
}

TEST_CASE("error: a rank other than -1 is shown", "[base][error]") {
    Error e({ErrorKind::dist, "all_reduce", "a timeout", "", "", "", 3, ""});
    CHECK(std::string(e.what()) == "[rank 3] all_reduce: got a timeout");
}

TEST_CASE("problems: none is no error, one is the error itself, several are all listed", "[base][error]") {
    CHECK_NOTHROW(throw_problems(ErrorKind::config, "configuration", {}));
    Problem first{"a.b", "1", "2", "try 2"}, second{"c", "x", "y", ""};
    try {
        throw_problems(ErrorKind::config, "configuration", {first});
        FAIL("no error");
    } catch (const Error& e) {
        CHECK(e.parts().op == "a.b");
        CHECK(std::string(e.what()) == "a.b: got 1, want 2 (try 2)");
    }
    try {
        throw_problems(ErrorKind::config, "configuration", {first, second}, "f.json");
        FAIL("no error");
    } catch (const Error& e) {
        std::string text = e.what();
        CHECK(text.find("2 problems") != std::string::npos);
        CHECK(text.find("a.b: got 1, want 2 (try 2)") != std::string::npos);
        CHECK(text.find("c: got x, want y") != std::string::npos);
        CHECK(e.parts().where == "f.json");
    }
}
