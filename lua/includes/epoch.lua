-- What Redis knows about a product is valid only under the epoch in which it learned it, and for the generation of counts that
-- Postgres names. The epoch follows from this Redis process and its replication history, and from the pipeline's Postgres, which
-- counts how often the Redis was another one. It is written into this text when the script is loaded, and the script cache dies
-- with the process: after a restart no old text can run, whatever the data files restored.
local EPOCH = '@EPOCH@'

-- What every script returns for a product that is not loaded, or whose state here is invalid.
local INVALID = -1

local function current(stock_key, generation)
    return redis.call('HGET', stock_key, 'epoch') == EPOCH .. ':' .. generation
end

-- The claims hash that stands beside a takes hash.
local function claims_beside(takes_key)
    return (string.gsub(takes_key, ':takes$', ':claims'))
end

-- Note the newest claim of the product's partition; whether it is this one. Takes are of one claim only, and go with it. What
-- a former owner took is in Postgres's counts, or came to nothing: and of that the next owner need not hear, where the order's
-- home is another worker's by now, or its record is gone. And an owner that lost its partition and does not know it yet would
-- take units for orders that are decided already.
local function note_claim(stock_key, takes_key, claim)
    local newest = tonumber(redis.call('HGET', stock_key, 'claim') or 0)
    if tonumber(claim) > newest then
        redis.call('DEL', takes_key, claims_beside(takes_key))
        redis.call('HSET', stock_key, 'claim', claim, 'taken', '0')
    end
    return tonumber(claim) >= newest
end

-- Calls with long lists are cut into pieces: unpack() has a limit of about 8,000 values.
local PIECE = 1000

-- Units of a take; of a limited product it names its user too ("units:user"), whose claim ends with it.
local function drop_claim(takes_key, take)
    local colon = string.find(take, ':', 1, true)
    local units, user = tonumber(string.sub(take, 1, colon - 1)), string.sub(take, colon + 1)
    local key = claims_beside(takes_key)
    if redis.call('HINCRBY', key, user, string.format('%d', -units)) <= 0 then
        redis.call('HDEL', key, user)
    end
    return units
end

-- Forget the takes of the orders ARGV[first], ARGV[first + 1], …; returns how many units they took. An order may be there
-- twice: its units count once.
local function drop_takes(takes_key, first)
    local units = 0
    for from = first, #ARGV, PIECE do
        local to = math.min(from + PIECE - 1, #ARGV)
        local quantities = redis.call('HMGET', takes_key, unpack(ARGV, from, to))
        local counted = {}
        for n = 1, #quantities do
            local id = ARGV[from + n - 1]
            if quantities[n] and not counted[id] then
                counted[id] = true
                units = units + (tonumber(quantities[n]) or drop_claim(takes_key, quantities[n]))
            end
        end
        redis.call('HDEL', takes_key, unpack(ARGV, from, to))
    end
    return units
end
