-- Ids that are the same on every machine and every day: 64-bit FNV-1a of a text, its bits mixed at the end.
-- Source: Fowler, Noll, Vo; the finaliser of MurmurHash3 (Appleby).
local function hash(text)
  local h = 0xcbf29ce484222325
  for i = 1, #text do h = (h ~ text:byte(i)) * 0x100000001b3 end
  h = (h ~ (h >> 33)) * 0xff51afd7ed558ccd
  h = (h ~ (h >> 33)) * 0xc4ceb9fe1a85ec53
  return h ~ (h >> 33)
end

return {
  --- 16 hexadecimal digits.
  id = function(text) return ("%016x"):format(hash(text)) end,
  --- A number in [0, 1) that depends on the text alone.
  uniform = function(text) return (hash(text) >> 11) * 2.0 ^ -53 end,
}
