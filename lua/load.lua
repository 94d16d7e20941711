--[[
  Load a product from Postgres, only where what is here is missing or invalid. The caller holds the product's row lock, so
  the counts can't change under it; a worker that lost its partition and does not know it yet can do no harm here.

  Takes of before are forgotten: they never reached Postgres, so no order was promised them.

  KEYS[1]  stock hash
  KEYS[2]  takes hash
  KEYS[3]  users hash, of a product with a limit, see reserve.lua
  KEYS[4]  claims hash, the same
  ARGV[1]  generation of the counts
  ARGV[2]  version
  ARGV[3]  on_hand
  ARGV[4]  reserved
  ARGV[5]  units that one user may have, empty for any number
  ARGV[6]  claim of the product's partition, as Postgres has it
  ARGV[7]… user, units, user, units, … : who has how many

  Returns  1 LOADED; 0 KNOWN: it was loaded already
--]]
--@include epoch
local LOADED, KNOWN = 1, 0

if current(KEYS[1], ARGV[1]) then
    return KNOWN
end
redis.call('DEL', KEYS[2])
redis.call('DEL', KEYS[1])
redis.call('DEL', KEYS[3], KEYS[4])
redis.call('HSET', KEYS[1], 'epoch', EPOCH .. ':' .. ARGV[1], 'version', ARGV[2], 'on_hand', ARGV[3],
    'reserved', ARGV[4], 'taken', '0', 'claim', ARGV[6])
if ARGV[5] ~= '' then
    redis.call('HSET', KEYS[1], 'limit', ARGV[5])
    for n = 7, #ARGV, 2 do
        redis.call('HSET', KEYS[3], ARGV[n], ARGV[n + 1] .. ':' .. ARGV[2])
    end
end
return LOADED
