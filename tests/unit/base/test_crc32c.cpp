#include "core/base/crc32c.h"
#include "tests/catch.h"

#include <string>

using namespace moe;

TEST_CASE("crc32c: known values, and the same in parts", "[base]") {
    for (auto crc : {crc32c, crc32c_by_tables}) {
        REQUIRE(crc("123456789", 9, 0) == 0xE3069283u);
        REQUIRE(crc("", 0, 0) == 0);
        std::string zeros(32, '\0');
        REQUIRE(crc(zeros.data(), 32, 0) == 0x8A9136AAu);   // RFC 3720, B.4
        std::string text = "any text that is longer than eight bytes";
        for (size_t cut = 0; cut <= text.size(); ++cut) REQUIRE(crc(text.data() + cut, text.size() - cut, crc(text.data(), cut, 0)) == crc(text.data(), text.size(), 0));
    }
}
