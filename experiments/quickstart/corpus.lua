-- A corpus of five domains from what any machine has once moelab is set up: nothing is downloaded. Each domain is a folder of
-- files for training and one for validation, split by file, so that no document is in both.
local corpus = {}

local function quote(s) return "'" .. s:gsub("'", "'\\''") .. "'" end

--- Lines that a shell command prints.
local function lines(command)
  local out, pipe = {}, assert(io.popen(command .. " 2>/dev/null"))
  for line in pipe:lines() do out[#out + 1] = line end
  pipe:close()
  return out
end

--- Files under a folder by a find expression, in an order that spreads neighbours: by a hash of the path.
local function files(folder, expression)
  local found = lines(("find -L %s -type f -readable %s -size +1k -size -400k"):format(quote(folder), expression))
  local key = {}
  for _, path in ipairs(found) do
    local h = 5381
    local tail = path:sub(#folder + 1)
    for i = 1, #tail do h = (h * 33 + tail:byte(i)) & 0xffffffff end
    key[path] = h
  end
  table.sort(found, function(a, b) if key[a] ~= key[b] then return key[a] < key[b] end return a < b end)
  return found
end

--- A source that yields the texts of files.
local function from_files(list)
  local i = 0
  return function()
    while i < #list do
      i = i + 1
      local text = moe.fs.read(list[i])
      if #text > 0 and not text:find("\0", 1, true) then return text end
    end
  end
end

--- Sums, differences, products and quotients with their results, worked out line by line.
local function arithmetic()
  local state = 20240601
  local function random(n)                       -- a small generator of its own: the same text on every machine
    state = (state * 1103515245 + 12345) & 0x7fffffff
    return (state >> 8) % n
  end
  return function()
    local out = {}
    for i = 1, 200 do
      local a, b = random(10 ^ (1 + random(3)) // 1), random(10 ^ (1 + random(3)) // 1)
      local kind = random(4)
      if kind == 0 then out[i] = ("%d + %d = %d"):format(a, b, a + b)
      elseif kind == 1 then out[i] = ("%d - %d = %d"):format(a, b, a - b)
      elseif kind == 2 then out[i] = ("%d * %d = %d"):format(a, b, a * b)
      else out[i] = ("%d = %d * %d + %d"):format(a, b + 1, a // (b + 1), a % (b + 1)) end
    end
    return table.concat(out, "\n") .. "\n"
  end
end

--- Machine code of installed programs as text, in pieces of about 60 kB.
local function assembly()
  local programs, i, pipe = lines("find /usr/bin /usr/lib -maxdepth 2 -type f -size +60k -size -3000k \\( -perm -u+x -o -name '*.so*' \\) | sort"), 0, nil
  return function()
    while true do
      if not pipe then
        i = i + 1
        if i > #programs then return nil end
        pipe = io.popen("objdump -d --no-show-raw-insn --no-addresses " .. quote(programs[i]) .. " 2>/dev/null | head -c 300000")
      end
      local text = pipe:read(60000)
      if text and #text > 5000 then return text end
      pipe:close()
      pipe = nil
    end
  end
end

--- The five domains: name, one line about it, and a function that gives its next document or nil.
local function domains(torch)
  return {
    { "cpp", "C++ headers of LibTorch", from_files(files(torch .. "/include", "-name '*.h'")) },
    { "python", "Python sources of the torch package", from_files(files(torch, "-name '*.py'")) },
    { "licences", "licences and copyright notes of installed packages", from_files(files("/usr/share", "\\( -path '*/common-licenses/*' -o -path '/usr/share/doc/*/copyright' -o -path '/usr/share/perl/*.pod' \\)")) },
    { "assembly", "machine code of installed programs, disassembled", assembly() },
    { "arithmetic", "generated sums, differences, products and quotients", arithmetic() },
  }
end

--- Writes <folder>/{train,validation}/<domain>/N.txt, or finds them from an earlier call. `bytes` is the size of each domain's
--- training part; validation gets a tenth of it. Returns the list of {name, about, train, validation}.
function corpus.build(folder, torch, bytes)
  local out = {}
  for _, d in ipairs(domains(torch)) do
    local name, about, next_document = table.unpack(d)
    local entry = { name = name, about = about, train = folder .. "/train/" .. name, validation = folder .. "/validation/" .. name }
    out[#out + 1] = entry
    local stamp = ("%s/%s.%d.done"):format(folder, name, bytes)
    if not moe.fs.exists(stamp) then
      os.execute(("rm -f %s/%s.*.done"):format(quote(folder), name))      -- stamps of another size, or of a build that this one replaces
      for _, part in ipairs { entry.train, entry.validation } do
        if moe.fs.exists(part) then moe.fs.remove(part, { recursive = true }) end
        moe.fs.mkdir(part)
      end
      local size, n = { train = 0, validation = 0 }, 0
      while size.train < bytes or size.validation < bytes / 10 do
        local text = next_document()
        if not text then break end
        n = n + 1
        local part = n % 10 == 0 and "validation" or "train"
        if size[part] < (part == "train" and bytes or bytes / 10) then
          moe.fs.write(("%s/%d.txt"):format(entry[part], n), text)
          size[part] = size[part] + #text
        end
      end
      if size.train < 200000 or size.validation < 20000 then
        moe.fail { kind = "data", op = "quickstart: domain " .. name, got = ("%d bytes for training, %d for validation"):format(size.train, size.validation),
          want = "at least 200 kB and 20 kB", hint = "the domain is made of " .. about .. "; are they there" .. (name == "assembly" and ", and objdump of binutils" or "") .. "? megabytes=1 or more" }
      end
      moe.fs.write(stamp, "")
    end
  end
  return out
end

return corpus
