--[[
  Take units of one product for a list of orders, each if there are enough left, in the order of the list.

  A take is kept by order id until Postgres has decided it (decided.lua, release.lua): an order that comes again gets the
  answer that it got before, and nothing is taken twice.

  KEYS[1]  stock hash: epoch, version, on_hand, reserved (as Postgres had them at that version), taken (sum of takes)
  KEYS[2]  takes hash: order id -> units; of a limited product units:user
  ARGV[1]  generation of the counts
  ARGV[2]  the caller's claim of the product's partition
  ARGV[3]… order id, units, order id, units, …

  A product with a limit (field `limit` of the stock hash: units that one user may have) is asked for with two more keys, and
  with the user of each order:

  KEYS[3]  users hash: user -> units:version, as Postgres counted them
  KEYS[4]  claims hash: user -> units, the sum of the user's takes
  ARGV[3]… order id, units, user, order id, units, user, …

  Returns  a list, for each order:
           1 TAKEN: now or before
           0 REFUSED: not enough left; nothing is written
           3 LIMITED: more than its user may have; nothing is written
           4 PERHAPS: not enough left, unless Postgres' counts contain some of the takes already; nothing is written
           or the list { -1 INVALID }: the product is not loaded, or of another generation, or the caller is wrong about
           whether it has a limit: load it, then ask again
           or the list { -2 SUPERSEDED }: another worker owns the product now; nothing is written

  The codes are GateVerdict's in gate.py, but for PERHAPS, which Postgres has to decide.
--]]
--@include epoch
local TAKEN, REFUSED, LIMITED, PERHAPS, SUPERSEDED = 1, 0, 3, 4, -2
local stock_key, takes_key = KEYS[1], KEYS[2]

if not current(stock_key, ARGV[1]) then
    return { INVALID }
end
if not note_claim(stock_key, takes_key, ARGV[2]) then
    return { SUPERSEDED }
end

local counts = redis.call('HMGET', stock_key, 'on_hand', 'reserved', 'taken', 'limit')
local limit = counts[4] and tonumber(counts[4])
if (limit and 4 or 2) ~= #KEYS then
    return { INVALID }
end
local stride = limit and 3 or 2
local piece = PIECE / 2 * stride
local had = {}
local taken = tonumber(counts[3])
local left = tonumber(counts[1]) - tonumber(counts[2]) - taken
local answers, before = {}, taken

-- Whether a user may have so many units more; if so, they are claimed.
local function claim(user, units)
    if not had[user] then
        local known = redis.call('HGET', KEYS[3], user)
        local claimed = redis.call('HGET', KEYS[4], user)
        had[user] = (known and tonumber(string.match(known, '^%d+')) or 0) + (claimed and tonumber(claimed) or 0)
    end
    if had[user] + units > limit then
        return false
    end
    had[user] = had[user] + units
    redis.call('HINCRBY', KEYS[4], user, string.format('%d', units))
    return true
end

for from = 3, #ARGV, piece do
    local to = math.min(from + piece - 1, #ARGV)
    local ids, news = {}, {}
    for n = from, to, stride do
        ids[#ids + 1] = ARGV[n]
    end
    local known = redis.call('HMGET', takes_key, unpack(ids))
    local seen = {}
    for n = 1, #ids do
        local at = from + stride * (n - 1)
        local units = tonumber(ARGV[at + 1])
        if known[n] or seen[ids[n]] then
            answers[#answers + 1] = TAKEN
        elseif units > left then
            -- Another stage may have set counts that contain takes which their own stage is only about to forget: then these
            -- units are subtracted twice. Takes of this call are in no counts.
            answers[#answers + 1] = units > left + before and REFUSED or PERHAPS
        elseif limit and not claim(ARGV[at + 2], units) then
            answers[#answers + 1] = LIMITED
        else
            left = left - units
            taken = taken + units
            seen[ids[n]] = true
            news[#news + 1] = ids[n]
            news[#news + 1] = limit and ARGV[at + 1] .. ':' .. ARGV[at + 2] or ARGV[at + 1]
            answers[#answers + 1] = TAKEN
        end
    end
    if #news > 0 then
        redis.call('HSET', takes_key, unpack(news))
    end
end
if taken ~= before then
    redis.call('HSET', stock_key, 'taken', string.format('%d', taken))
end
return answers
