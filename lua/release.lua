--[[
  Give takes back about which Postgres had nothing to decide: the order's id is that of another order, or the order was
  decided before. Run by reserve, for a product of which Postgres decided no line.

  KEYS[1]  stock hash
  KEYS[2]  takes hash
  ARGV[1]  generation of the counts
  ARGV[2]  the caller's claim of the product's partition
  ARGV[3]… order ids; one without a take is passed over

  Returns  1 DONE; -1 INVALID: not loaded, or of another generation
--]]
--@include epoch
local DONE = 1

if not current(KEYS[1], ARGV[1]) then
    return INVALID
end
if note_claim(KEYS[1], KEYS[2], ARGV[2]) then
    local units = drop_takes(KEYS[2], 3)
    if units > 0 then
        redis.call('HINCRBY', KEYS[1], 'taken', string.format('%d', -units))
    end
end
return DONE
