-- moelab check [output_dir=FOLDER] [--json]: what of this machine works, what is missing and how to get it.
local TOOL_SECS = 10
local MIN_BYTES = 2 ^ 30     -- of memory and of disk; the smallest configurations need less
local COLOURS = { works = "\27[32m", missing = "\27[31m", ["not needed"] = "\27[2m" }

local function text_of(path)
  local file = io.open(path)
  if not file then return "" end
  local text = file:read("a") or ""
  file:close()
  return text
end

-- The output of the first of some programs that is there and answers; else nil and why not.
local function ask(...)
  local why
  for _, words in ipairs { ... } do
    local r = moe.execute(words, { timeout_secs = TOOL_SECS })
    if r.timed_out then
      why = ("%s gave no answer in %d s"):format(words[1], TOOL_SECS)
    elseif r.found and r.code == 0 then
      return r.output
    elseif r.found then
      why = ("%s failed with %d: %s"):format(words[1], r.code, r.output:match("[^\n]*"))
    end
  end
  return nil, why or "none"
end

local function version_in(text) return text:match("%d+%.%d+[%.%d]*") or text:match("[^\n]*") end

-- --- rows: {what, state, found, get, needed} ---

local function row(what, works, found, get, needed)
  return { what = what, state = works and "works" or "missing", found = found, get = not works and get or nil, needed = needed or false }
end
local function unneeded(what, found) return { what = what, state = "not needed", found = found, needed = false } end

local function tool(what, get, ...)
  local out, why = ask(...)
  return row(what, out ~= nil, out and version_in(out) or why, get)
end

local function processor()
  local info = text_of("/proc/cpuinfo")
  local cores, logical, socket = {}, 0, "0"
  for line in info:gmatch("[^\n]+") do
    if line:match("^processor%s*:") then logical = logical + 1 end
    socket = line:match("^physical id%s*:%s*(%d+)") or socket
    local core = line:match("^core id%s*:%s*(%d+)")
    if core then cores[socket .. "/" .. core] = true end
  end
  local physical = 0
  for _ in pairs(cores) do physical = physical + 1 end
  local flags, sets = " " .. (info:match("flags%s*:([^\n]*)") or "") .. " ", {}
  for _, set in ipairs { "amx_bf16", "avx512_bf16", "avx512f", "avx2" } do
    if flags:find(" " .. set .. " ", 1, true) then sets[#sets + 1] = set end
  end
  local found = ("%s, %d cores (%d threads), %s"):format(info:match("model name%s*:%s*([^\n]+)") or "unknown model", math.max(physical, 1), logical,
    #sets > 0 and table.concat(sets, " ") or "no vector extension of AVX2 or later: slow")
  return row("processor", true, found, nil, true)
end

local function memory()
  local m = moe.host_memory()
  return row("memory", m.available >= MIN_BYTES, ("%s, %s available"):format(moe.format_bytes(m.total), moe.format_bytes(m.available)), "end other programs, or ask for more memory in the job", true)
end

local function disk(folder)
  local bytes, writable = moe.fs.free(folder)
  return row("output_dir", writable and bytes >= MIN_BYTES, ("%s: %s free%s"):format(folder, moe.format_bytes(bytes), writable and "" or ", not writable"), "output_dir=FOLDER of a disk with space that you may write", true)
end

local function libtorch()
  local cuda = moe.torch_version:match("%+cu(%d+)")
  return row("LibTorch", true, ("%s (%s); this program was built %s CUDA"):format(moe.torch_version, cuda and "with CUDA " .. cuda:sub(1, -2) .. "." .. cuda:sub(-1) or "CPU only", moe.with_cuda and "with" or "without"), nil, true)
end

-- GPU, driver and nvcc belong together: where no driver answers, none of them is needed.
local function gpu_rows()
  local query = { "nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader" }
  local out, why = ask(query)
  local has_device = out ~= nil or moe.fs.exists("/proc/driver/nvidia/version") or moe.fs.exists("/dev/nvidia0")
  local list = moe.gpus()
  if not has_device and #list == 0 then
    return { unneeded("GPU", "none: models run on the processor"), unneeded("driver", "no NVIDIA GPU"), unneeded("nvcc", "no NVIDIA GPU") }
  end
  local texts = {}
  for i, g in ipairs(list) do texts[i] = ("%s, %s, compute capability %s"):format(g.name, moe.format_bytes(g.memory), g.capability) end
  if #list == 0 and out then
    for line in out:gmatch("[^\n]+") do texts[#texts + 1] = line end
  end
  local counted, order = {}, {}
  for _, text in ipairs(texts) do
    if not counted[text] then order[#order + 1] = text end
    counted[text] = (counted[text] or 0) + 1
  end
  for i, text in ipairs(order) do order[i] = ("%d x %s"):format(counted[text], text) end
  local found = #order > 0 and table.concat(order, "; ") or "a driver, and no GPU that answers"
  local get = moe.with_cuda and "a driver that fits CUDA " .. (moe.torch_version:match("%+cu(%d+)") or "") .. "; nvidia-smi says more" or "nvcc on the PATH, then ./moelab build: this program has no CUDA parts"
  local driver = (out and out:match("([%d%.]+)%s*\n")) or text_of("/proc/driver/nvidia/version"):match("Kernel Module%s+[^%d]*([%d%.]+)")
  return { row("GPU", #list > 0, found, get), row("driver", driver ~= nil, driver or why, "the system's NVIDIA driver package (apt: nvidia-driver)"),
    tool("nvcc", "CUDA 13's toolkit (apt: cuda-toolkit-13-0 of NVIDIA's repository)", { "nvcc", "--version" }, { "/usr/local/cuda/bin/nvcc", "--version" }) }
end

local function mpi()
  local plugin, why = moe.mpi_plugin()
  return { tool("mpirun", "apt: openmpi-bin (for several ranks)", { "mpirun", "--version" }),
    row("MPI plugin", plugin ~= nil, plugin and "opens" or why, "apt: libopenmpi-dev, then ./moelab build (for several ranks)") }
end

local function rows_of(output_dir)
  local list = { processor(), memory(), disk(output_dir), libtorch() }
  local function add(more) for _, r in ipairs(more) do list[#list + 1] = r end end
  add(gpu_rows())
  add { tool("compiler", "apt: g++ (12 or newer; to build)", { "c++", "--version" }, { "g++", "--version" }), tool("CMake", "apt: cmake (3.25 or newer; to build)", { "cmake", "--version" }),
    tool("Ninja", "apt: ninja-build (to build)", { "ninja", "--version" }) }
  add(mpi())
  add { tool("Slurm", "on a cluster's login node; apt: slurm-client", { "sinfo", "--version" }), tool("sbatch", "with Slurm", { "sbatch", "--version" }),
    tool("Python", "apt: python3-venv (for the LibTorch wheel)", { "python3", "--version" }),
    tool("Jupyter", "pip install jupyterlab (for notebooks)", { "jupyter-lab", "--version" }, { "jupyter", "--version" }),
    tool("TensorBoard", "pip install tensorboard (event files come with monitoring)", { "tensorboard", "--version" }) }
  return list
end

local function show(list)
  local rows = {}
  for i, r in ipairs(list) do rows[i] = { r.state, r.what, r.found, r.get or "" } end
  local text = tostring(moe.table(rows, { titles = { "state", "what", "found", "how to get it" } }))
  if moe.is_terminal() and not os.getenv("NO_COLOR") then
    text = ("\n" .. text):gsub("\n(%l+ ?%l*)(%s)", function(state, space)
      local name = state:gsub("%s+$", "")
      return COLOURS[name] and "\n" .. COLOURS[name] .. state .. "\27[0m" .. space or nil
    end):sub(2)
  end
  print(text)
end

return function(words, options, given)
  moe.check_keys(options, { "output_dir" }, "check: options")
  local list, lacking = rows_of(tostring(options.output_dir or "outputs")), {}
  for _, r in ipairs(list) do
    if r.needed and r.state == "missing" then lacking[#lacking + 1] = r.what end
  end
  if given.json then
    print(moe.json.encode { ok = #lacking == 0, rows = list })
  else
    show(list)
    if #lacking == 0 then print("\nEverything that training needs works. Next: moelab list, moelab quickstart") end
  end
  if #lacking > 0 then
    moe.fail { kind = "state", op = "check", got = table.concat(lacking, ", ") .. " missing", want = "all that training needs", hint = "the rows above say how to get it" }
  end
end
