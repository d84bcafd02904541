-- moe.data(source, options): batches of tokens from a name, a path or a configuration.
local KEYS = { "tokens", "seq_length", "batch_size", "validation", "type", "tokenizer", "domains", "seed", "text_field" }

-- What every installation has: LibTorch's headers and, where it came as a wheel, its Python.
local function local_corpus()
  local torch = moe.torch_folder()
  local sources = {}
  local function add(name, folder)
    if moe.fs.exists(folder) then sources[#sources + 1] = { name = name, path = folder } end
  end
  add("c++", torch .. "/include/ATen/core")
  add("python", torch .. "/nn")
  if #sources == 0 then moe.fail { kind = "data", op = 'moe.data: "local_corpus"', got = "no text in " .. torch, want = "LibTorch with its headers", hint = "give a path of text instead" } end
  return { dataset_type = "text", sources = sources }
end

local function type_of(path)
  local name = path:lower():gsub("%.gz$", ""):gsub("%.zst$", "")
  if name:find("%.jsonl$") then return "jsonl" end
  if name:find("%.npy$") or name:find("%.bin$") then return "tokens" end
  return "text"
end

local function is_config(value) return type(value) == "userdata" or type(value) == "table" end

local function data(source, options)
  options = moe.check_keys(options or {}, KEYS, "moe.data: options")
  local config, section = nil, nil
  if is_config(source) then
    config = moe.config(source)
  elseif type(source) ~= "string" then
    moe.fail { op = "moe.data: source", got = type(source), want = '"synthetic", "local_corpus", a path, or a configuration' }
  elseif source == "synthetic" then
    section = { dataset_type = "synthetic", synthetic = { domains = options.domains or 4 } }
  elseif source == "local_corpus" then
    section = local_corpus()
  elseif moe.fs.exists(source) and not source:find("%.json$") then
    section = { dataset_type = options.type or type_of(source), path = source, text_field = options.text_field }
  else
    local ok, found = pcall(moe.config, source)
    if not ok then
      moe.fail { kind = "data", op = "moe.data: source", got = '"' .. source .. '"', want = '"synthetic", "local_corpus", a file or folder of data, or a configuration', hint = "moe.config_names() lists the ready configurations" }
    end
    config = found
  end
  if section then
    section.tokenizer = options.tokenizer
    config = moe.config { data = section, model = { vocab_size = moe.null }, training = { seq_length = 256, micro_batch_size = 8 } }
  else
    for _, key in ipairs { "type", "tokenizer", "domains", "text_field" } do
      if options[key] ~= nil then moe.fail { op = "moe.data: " .. key, got = "a configuration and " .. key, want = "one of them", hint = "change the configuration with :with" } end
    end
  end
  if options.seed then config = config:with { seed = options.seed, data = { preprocessing = { shuffle_seed = options.seed } } } end
  return moe.open_data(config, { validation = options.validation, tokens = options.tokens and math.tointeger(options.tokens) or options.tokens, batch_size = options.batch_size, seq_length = options.seq_length })
end

return moe.document(data, "moe.data",
  'moe.data(source, {tokens =, seq_length =, batch_size =, validation = false, type = "text" | "jsonl" | "tokens", tokenizer = "bytes", domains = 4, seed =, text_field =}): batches of token ids with a domain for each. source: "synthetic" (random processes, one a domain), '
  .. '"local_corpus" (text that LibTorch brings: C++ headers and Python), a file or folder (text, .jsonl, .npy or .bin; the subfolders of a folder are its domains), or a configuration or its name. It ends after `tokens` tokens, rounded up to whole batches.'
  .. "\nExample: for b in moe.data(\"synthetic\", { tokens = 128, seq_length = 32, batch_size = 2 }):batches() do print(b.ids.shape[1], b.ids.shape[2]) end")
