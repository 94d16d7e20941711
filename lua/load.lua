--[[
  Load a product from Postgres, only where what is here is missing or void. The caller holds the product's row lock, so
  the counts can't change under it; a worker that lost its partition and does not know it yet can do no harm here.

  Takes of before are forgotten: Postgres never heard of them, so they were never promised to anybody.

  KEYS[1]  stock hash
  KEYS[2]  takes hash
  KEYS[3]  users hash, KEYS[4] claims hash: only of products with a limit, see reserve.lua
  ARGV[1]  generation of the counts
  ARGV[2]  version, ARGV[3] on_hand, ARGV[4] reserved
  ARGV[5]  units that one user may have, empty for any number
  ARGV[6]… user, units, user, units, … : who has how many

  Returns  1 loaded, 0 it was loaded already
--]]
--@include epoch
if current(KEYS[1], ARGV[1]) then
    return 0
end
redis.call('DEL', KEYS[2])
redis.call('DEL', KEYS[1])
redis.call('DEL', KEYS[3], KEYS[4])
redis.call('HSET', KEYS[1], 'epoch', RUN_ID .. ':' .. ARGV[1], 'version', ARGV[2], 'on_hand', ARGV[3],
    'reserved', ARGV[4], 'taken', '0')
if ARGV[5] ~= '' then
    redis.call('HSET', KEYS[1], 'limit', ARGV[5])
    for n = 6, #ARGV, 2 do
        redis.call('HSET', KEYS[3], ARGV[n], ARGV[n + 1] .. ':' .. ARGV[2])
    end
end
return 1
