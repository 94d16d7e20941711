--[[
  Postgres has decided these takes: set its counts and forget the takes, in one step, so that what is left stays exact.

  Orders that have no take here are passed over. Counts older than those already here are not set: two stages may report
  in another order than Postgres committed.

  KEYS[1]  stock hash
  KEYS[2]  takes hash
  ARGV[1]  generation of the counts
  ARGV[2]  version, ARGV[3] on_hand, ARGV[4] reserved: as Postgres has them now
  ARGV[5]… ids of the orders whose takes Postgres has decided

  Returns  1 done, -1 not loaded or void (Postgres has the truth, so nothing is lost)
--]]
--@include epoch
if not current(KEYS[1], ARGV[1]) then
    return -1
end
local units = drop_takes(KEYS[2], 5)
if units > 0 then
    redis.call('HINCRBY', KEYS[1], 'taken', string.format('%d', -units))
end
if tonumber(ARGV[2]) > tonumber(redis.call('HGET', KEYS[1], 'version')) then
    redis.call('HSET', KEYS[1], 'version', ARGV[2], 'on_hand', ARGV[3], 'reserved', ARGV[4])
end
return 1
