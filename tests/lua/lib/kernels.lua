-- What the scripts about moe.kernels share: the functions of check.lua, random numbers, and comparisons of tensors.
local check = dofile(arg[0]:match("^(.*)/") .. "/lib/check.lua")
local fp64 = { dtype = "fp64" }
moe.seed(11)

function check.randn(...) return moe.randn({ ... }, fp64) end
function check.shape(t) return tostring(t.shape) end

-- nan and inf first, then the largest error.
function check.close(got, want, tolerance, what)
  check.equal(check.shape(got), check.shape(want), what)
  check.is(got:is_finite(), (what or "") .. " not finite")
  if got:numel() == 0 then return end
  local error = (got:to("fp64") - want:to("fp64")):abs():max():item()
  check.is(error <= (tolerance or 1e-12), ("%s differs by %g"):format(what or "result", error))
end

-- The same dtype, shape and numbers.
function check.same(got, want)
  check.is(got.dtype == want.dtype and check.shape(got) == check.shape(want) and got:eq(want):to("fp32"):sum():item() == want:numel(), "not the same numbers")
end

return check
