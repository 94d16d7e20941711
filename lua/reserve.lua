--[[
  Take units of one product for a list of orders, each if there are enough left, in the order of the list.

  A take is remembered by order id until Postgres has made it a hold (decided.lua) or refused it (release.lua): an order
  that comes again gets the answer that it got before, and nothing is taken twice.

  KEYS[1]  stock hash: epoch, version, on_hand, reserved (as Postgres had them at that version), taken (sum of takes)
  KEYS[2]  takes hash: order id -> units; of a limited product units:user
  ARGV[1]  generation of the counts
  ARGV[2]… order id, units, order id, units, …

  A product with a limit (field `limit` of the stock hash: units that one user may have) is asked for with two more keys, and
  with the user of each order:

  KEYS[3]  users hash: user -> units:version, as Postgres counted them
  KEYS[4]  claims hash: user -> units, the sum of the user's takes
  ARGV[2]… order id, units, user, order id, units, user, …

  Returns  a list, for each order: 1 taken (now or before), 0 not enough left, 3 more than its user may have, 4 not enough
           left unless Postgres' counts have some of the takes already; nothing is written for a 0, a 3 or a 4
           {-1} the product is not loaded, or what is here is void, or it has a limit and the caller did not know, or the other
           way round: load it, then ask again
--]]
--@include epoch
local stock_key, takes_key = KEYS[1], KEYS[2]

if not current(stock_key, ARGV[1]) then
    return { -1 }
end

local counts = redis.call('HMGET', stock_key, 'on_hand', 'reserved', 'taken', 'limit')
local limit = counts[4] and tonumber(counts[4])
if (limit and 4 or 2) ~= #KEYS then
    return { -1 }
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

for from = 2, #ARGV, piece do
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
            answers[#answers + 1] = 1
        elseif units > left then
            -- Another stage may have told counts that contain takes which their own stage is only about to forget: then these
            -- units are missing twice. Takes of this call are in no counts.
            answers[#answers + 1] = units > left + before and 0 or 4
        elseif limit and not claim(ARGV[at + 2], units) then
            answers[#answers + 1] = 3
        else
            left = left - units
            taken = taken + units
            seen[ids[n]] = true
            news[#news + 1] = ids[n]
            news[#news + 1] = limit and ARGV[at + 1] .. ':' .. ARGV[at + 2] or ARGV[at + 1]
            answers[#answers + 1] = 1
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
