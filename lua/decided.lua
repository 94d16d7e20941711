--[[
  Postgres has decided these takes: set its counts and forget the takes, in one step, so that what is left stays exact.
  Run by reserve, after its commit in Postgres.

  Orders that have no take here are passed over. Counts older than those already here are not set: two stages may report
  in another order than Postgres committed.

  KEYS[1]  stock hash
  KEYS[2]  takes hash
  ARGV[1]  generation of the counts
  ARGV[2]  version, as Postgres has it now
  ARGV[3]  on_hand, the same
  ARGV[4]  reserved, the same
  ARGV[5]  the caller's claim of the product's partition
  ARGV[6]… ids of the orders whose takes Postgres has decided

  Returns  1 DONE; -1 INVALID: not loaded, or of another generation (Postgres has the truth, so nothing is lost)
--]]
--@include epoch
local DONE = 1

if not current(KEYS[1], ARGV[1]) then
    return INVALID
end
if note_claim(KEYS[1], KEYS[2], ARGV[5]) then
    local units = drop_takes(KEYS[2], 6)
    if units > 0 then
        redis.call('HINCRBY', KEYS[1], 'taken', string.format('%d', -units))
    end
end
if tonumber(ARGV[2]) > tonumber(redis.call('HGET', KEYS[1], 'version')) then
    redis.call('HSET', KEYS[1], 'version', ARGV[2], 'on_hand', ARGV[3], 'reserved', ARGV[4])
end
return DONE
