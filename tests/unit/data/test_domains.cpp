#include "core/data/permutation.h"
#include "core/data/synthetic_domain.h"
#include "core/data/text_domain.h"
#include "core/data/tokenizer.h"
#include "tests/error_of.h"
#include "tests/folder.h"

#include <cmath>
#include <map>
#include <set>

using namespace moe;
using moe::test::error_of;
using namespace moe::data;

namespace {
std::string text_of(const TextDomain& domain, int64_t document, int64_t bytes) {
    std::vector<int64_t> ids(size_t(bytes + 2));
    int64_t got = domain.read(document, 0, ids);
    REQUIRE(got == bytes + 1);
    REQUIRE(ids[size_t(bytes)] == ByteTokenizer::kEndOfDocument);
    ids.resize(size_t(got));
    return ByteTokenizer().decode(ids);
}

// Relative frequencies of pairs of neighbours and of single tokens in `documents` documents.
double conditional_entropy(const SyntheticDomain& domain, int64_t documents) {
    std::map<int64_t, double> single;
    std::map<std::pair<int64_t, int64_t>, double> pairs;
    double total = 0;
    for (int64_t d = 0; d < documents; ++d) {
        std::vector<int64_t> ids(size_t(domain.chunk(d).length));
        domain.read(d, 0, ids);
        for (size_t i = 1; i + 1 < ids.size(); ++i) {
            single[ids[i - 1]] += 1;
            pairs[{ids[i - 1], ids[i]}] += 1;
            total += 1;
        }
    }
    double h = 0;
    for (const auto& [pair, n] : pairs) h -= n / total * std::log(n / single[pair.first]);
    return h;
}
}  // namespace

TEST_CASE("tokenizer: bytes come back, special tokens give nothing, other ids are errors", "[data]") {
    ByteTokenizer tokenizer;
    std::string text("a\0\xff\xc3(z", 6);
    std::vector<int64_t> ids;
    tokenizer.encode(text, ids);
    REQUIRE(ids == std::vector<int64_t>{97, 0, 255, 195, 40, 122});
    REQUIRE(tokenizer.decode(ids) == text);
    ids.push_back(256);
    ids.push_back(263);
    REQUIRE(tokenizer.decode(ids) == text);
    ids.push_back(264);
    REQUIRE(error_of([&] { tokenizer.decode(ids); }).kind() == ErrorKind::data);
    REQUIRE(error_of([] { open_tokenizer("llama"); }).kind() == ErrorKind::config);
}

TEST_CASE("permutation: every index once, another order in every epoch and stream", "[data]") {
    for (int64_t n : {1, 2, 3, 5, 16, 17, 100, 1000}) {
        std::set<int64_t> seen;
        int64_t same_as_epoch_1 = 0, fixed = 0;
        for (int64_t i = 0; i < n; ++i) {
            int64_t p = permute(i, n, 7, 3, 0);
            REQUIRE(p >= 0);
            REQUIRE(p < n);
            seen.insert(p);
            same_as_epoch_1 += p == permute(i, n, 7, 3, 1);
            fixed += p == i;
        }
        REQUIRE(int64_t(seen.size()) == n);
        if (n == 1000) {
            REQUIRE(same_as_epoch_1 < 20);
            REQUIRE(fixed < 20);
        }
    }
}

TEST_CASE("text: files of a folder are documents in the order of their paths", "[data]") {
    test::Folder folder;
    folder.write("b/second.txt", "two\xff");
    folder.write("a.txt", "one");
    folder.write("empty.txt", "");
    folder.write(".hidden/no.txt", "no");
    folder.write("b/.no.txt", "no");
    TextDomain domain("d", folder.path(), 3, "data.path");
    REQUIRE(domain.num_documents() == 2);
    REQUIRE(domain.num_tokens() == 4 + 5);
    REQUIRE(text_of(domain, 0, 3) == "one");
    REQUIRE(text_of(domain, 1, 4) == "two\xff");
    std::vector<Chunk> chunks;
    for (int64_t i = 0; i < domain.num_chunks(); ++i) chunks.push_back(domain.chunk(i));
    REQUIRE((chunks == std::vector<Chunk>{{0, 0, 3}, {0, 3, 1}, {1, 0, 3}, {1, 3, 2}}));
    std::vector<int64_t> past(4);
    REQUIRE(domain.read(0, 3, past) == 1);
    REQUIRE(past[0] == 256);
    REQUIRE(domain.read(0, 4, past) == 0);
}

TEST_CASE("text: a big file is cut after the last line that fits, and nothing is lost", "[data]") {
    test::Folder folder;
    std::string text;
    for (int i = 0; text.size() < size_t(2.5 * kMaxDocumentBytes); ++i) text += std::string(size_t(i % 977), 'x') + std::to_string(i) + "\n";
    folder.write("big.txt", text);
    folder.write("one_line.txt", std::string(kMaxDocumentBytes + 10, 'y'));
    TextDomain domain("d", folder.path(), 64, "data.path");
    REQUIRE(domain.num_documents() == 5);
    std::string joined;
    for (int64_t d = 0; d < 3; ++d) {
        std::vector<int64_t> ids(size_t(kMaxDocumentBytes + 2));
        int64_t got = domain.read(d, 0, ids);
        REQUIRE(got <= kMaxDocumentBytes + 1);
        REQUIRE(ids[size_t(got - 2)] == '\n');
        ids.resize(size_t(got));
        joined += ByteTokenizer().decode(ids);
    }
    REQUIRE(joined == text);
    REQUIRE(text_of(domain, 3, kMaxDocumentBytes) == std::string(kMaxDocumentBytes, 'y'));
    REQUIRE(text_of(domain, 4, 10) == std::string(10, 'y'));
}

TEST_CASE("text: missing, empty and special paths are errors that name the path", "[data]") {
    test::Folder folder;
    folder.write("empty/a.txt", "");
    Error missing = error_of([&] { TextDomain("d", folder / "none", 8, "data.path"); });
    REQUIRE(missing.kind() == ErrorKind::io);
    REQUIRE(missing.parts().got.find(folder / "none") != std::string::npos);
    REQUIRE(!missing.parts().hint.empty());
    Error empty = error_of([&] { TextDomain("d", folder / "empty", 8, "data.path"); });
    REQUIRE(empty.kind() == ErrorKind::data);
    REQUIRE(empty.parts().op == "data.path");
    REQUIRE(error_of([] { TextDomain("d", "/dev/zero", 8, "data.path"); }).kind() == ErrorKind::io);
}

TEST_CASE("text: a file that shrinks while it is read is an error", "[data]") {
    test::Folder folder;
    folder.write("a.txt", "0123456789");
    TextDomain domain("d", folder / "a.txt", 8, "data.path");
    folder.write("a.txt", "012");
    std::vector<int64_t> ids(8);
    REQUIRE(error_of([&] { domain.read(0, 0, ids); }).kind() == ErrorKind::data);
}

TEST_CASE("text: more files than may stay open can be read", "[data]") {
    test::Folder folder;
    for (int i = 0; i < 300; ++i) folder.write(fmt::format("{:03}.txt", i), std::to_string(i));
    TextDomain domain("d", folder.path(), 8, "data.path");
    for (int round = 0; round < 2; ++round) {
        for (int64_t i = 0; i < 300; ++i) REQUIRE(text_of(domain, i, int64_t(std::to_string(i).size())) == std::to_string(i));
    }
}

TEST_CASE("synthetic: the same tokens whatever part is read, inside the vocabulary, ended once", "[data]") {
    for (int64_t vocab : {4, 61, 32000}) {
        SyntheticDomain domain(1, vocab, 5, 0);
        for (int64_t document : {0, 3}) {
            int64_t n = domain.chunk(document).length;
            REQUIRE(n >= 33);
            REQUIRE(n <= 1025);
            std::vector<int64_t> all(size_t(n + 7)), part(11);
            REQUIRE(domain.read(document, 0, all) == n);
            REQUIRE(domain.read(document, 13, part) == 11);
            for (int64_t i = 0; i < 11; ++i) REQUIRE(part[size_t(i)] == all[size_t(13 + i)]);
            for (int64_t i = 0; i < n - 1; ++i) REQUIRE((all[size_t(i)] >= 0 && all[size_t(i)] < vocab - 1));
            REQUIRE(all[size_t(n - 1)] == vocab - 1);
            REQUIRE(domain.read(document, n - 2, part) == 2);
        }
    }
    REQUIRE(error_of([] { SyntheticDomain(0, 3, 0, 0); }).kind() == ErrorKind::config);
}

TEST_CASE("synthetic: the entropy is clearly below a uniform draw's, and domains differ", "[data]") {
    constexpr int64_t kVocab = 264;
    SyntheticDomain a(0, kVocab, 9, 0), b(1, kVocab, 9, 0), held_out(0, kVocab, 9, int64_t(1) << 31);
    double h = conditional_entropy(a, 400);
    REQUIRE(h > 0.5);
    REQUIRE(h < 0.7 * std::log(double(kVocab)));
    // Total variation between the single-token distributions.
    auto histogram = [](const SyntheticDomain& domain) {
        std::vector<double> p(kVocab);
        double total = 0;
        for (int64_t d = 0; d < 200; ++d) {
            Chunk c = domain.chunk(d);
            std::vector<int64_t> ids(size_t(c.length));
            domain.read(c.document, 0, ids);
            for (int64_t id : ids) p[size_t(id)] += 1, total += 1;
        }
        for (double& x : p) x /= total;
        return p;
    };
    auto distance = [](const std::vector<double>& p, const std::vector<double>& q) {
        double sum = 0;
        for (size_t i = 0; i < p.size(); ++i) sum += std::abs(p[i] - q[i]) / 2;
        return sum;
    };
    auto pa = histogram(a);
    REQUIRE(distance(pa, histogram(b)) > 0.4);
    REQUIRE(distance(pa, histogram(held_out)) < 0.1);
}
