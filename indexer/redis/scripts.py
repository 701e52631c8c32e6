"""What is done in Redis in one step.

Most begin with a key and the value that it must have, else they do nothing and give 0. For blocks and logs it is the
guard of the slot, for records the owner of the source: both say which builder writes, ``<builder>.<epoch>``. So once
another builder took a source over, or the database began empty, what the first still has to say is refused; and a
builder that does not know what became of something it wrote begins a new epoch, before which nothing can arrive late.
"""

AT_ONCE = 512
"""Blocks that one script call changes: Redis does nothing else meanwhile, for about a quarter of a millisecond."""

WHEN_FULL = "#!lua flags=allow-oom\n"
"""Put before a script that frees memory, or says that it has to be: it is done though Redis is full (Redis 7)."""

_GUARDED = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
"""

_DYING = """
if redis.call('HGET', KEYS[1], ARGV[2]) ~= ARGV[1] then return 0 end
"""

TAKE_SLOT = """
local number = redis.call('BITPOS', KEYS[1], 0)
if number >= tonumber(ARGV[1]) then return -1 end
redis.call('SETBIT', KEYS[1], number, 1)
return number
"""
"""Gives the lowest slot number that is free, -1 where there is none."""

CLAIM = """
local guard = redis.call('GET', KEYS[1])
if guard then return guard == ARGV[1] and 1 or 0 end
if redis.call('HEXISTS', KEYS[2], ARGV[2]) + redis.call('EXISTS', KEYS[3]) > 0 then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""
"""Makes a slot number that was free a builder's own in one part; refuses one of which anything is left there."""

SWAP = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""
"""Makes a source a builder's own, if it is still whose it was a moment ago."""

RENEW = """
local builder, epoch = string.match(ARGV[1], '^(.*)%.(%d+)$')
local lost = {}
for at = 1, #KEYS do
  local mine, before = string.match(redis.call('GET', KEYS[at]) or '', '^(.*)%.(%d+)$')
  if mine == builder and tonumber(before) <= tonumber(epoch) then redis.call('SET', KEYS[at], ARGV[1])
  else lost[#lost + 1] = at end
end
return lost
"""
"""Takes what is a builder's own over to its new epoch; gives what is not its own any more."""

HOLD = (
    _GUARDED
    + """
redis.call('APPEND', KEYS[2], ARGV[3])
for at = 3, #KEYS do redis.call('SETBIT', KEYS[at], ARGV[2], 1) end
return 1
"""
)
"""Adds a slot to blocks, and says so in its log, first: from the log the bits are taken back."""

_RELEASE = """
local bit = ARGV[#ARGV]
for at = 2, #KEYS do
  if redis.call('GETBIT', KEYS[at], bit) == 1 then
    if redis.call('BITCOUNT', KEYS[at]) == 1 then redis.call('DEL', KEYS[at])
    else redis.call('SETBIT', KEYS[at], bit, 0) end
  end
end
return 1
"""

RELEASE = _GUARDED + _RELEASE
"""Takes a slot out of blocks; what nobody holds is gone in the same step, so that no writer meets it half gone."""

APPEND = (
    _GUARDED
    + """
redis.call('APPEND', KEYS[2], ARGV[2])
return 1
"""
)

REPLACE = (
    _GUARDED
    + """
redis.call('SET', KEYS[2], ARGV[2])
return 1
"""
)

_RETIRE = """
for at = 6, #ARGV, 2 do
  local builder, epoch = string.match(ARGV[at + 1], '^(.*)%.(%d+)$')
  local mine, before = string.match(redis.call('GET', KEYS[2 + at / 2]) or '', '^(.*)%.(%d+)$')
  if mine and mine == builder and tonumber(before) <= tonumber(epoch) then
    redis.call('HSETNX', KEYS[4], ARGV[at], ARGV[5])
  end
end
return 1
"""

PUBLISH = (
    _GUARDED
    + """
for at = 5 + (#ARGV - 5) / 2, #KEYS do
  if redis.call('GET', KEYS[at]) ~= ARGV[1] then return 0 end
end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
if ARGV[4] ~= '0' then redis.call('INCRBY', KEYS[3], ARGV[4]) end
"""
    + _RETIRE
)
"""Writes a source's record, with a new version where readers have to know, and retires slots that it no longer has.

Arguments: field, record, what the version grows by, something that stands for the retirement, and for each slot that is
retired its number and whose it was. Keys: the directory, the version, the retired slots, the guards of those that are
retired, and the guards of those that the source has, which have to be the builder's own.

A slot is retired only if it is still whose it was, no later than in the epoch that is said: not when the number was
swept and given to somebody else since.
"""

LEAVE = (
    _GUARDED
    + """
redis.call('DEL', KEYS[1])
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('INCRBY', KEYS[3], ARGV[4])
"""
    + _RETIRE
)
"""Takes a source out of the directory and retires its slots. Arguments as for `PUBLISH`, the record is not read."""

CLOSE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('HSETNX', KEYS[2], ARGV[2], ARGV[3])
return 1
"""
"""Ends a retired slot in one part: from here on nobody writes it there, and it can be swept."""

RELEASE_DYING = _DYING + _RELEASE

ADVANCE = (
    _DYING
    + """
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
return 1
"""
)
"""Says how far a slot is swept in one part, if it still is to be swept, and nobody said more meanwhile."""

SWEPT = (
    _DYING
    + """
redis.call('HDEL', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[2])
return 1
"""
)
"""Says that a slot is swept in one part."""

FREE = (
    _DYING
    + """
redis.call('HDEL', KEYS[1], ARGV[2])
redis.call('SETBIT', KEYS[2], ARGV[2], 0)
return 1
"""
)
"""Makes the number of a slot that is swept everywhere free again, once."""

SHARE = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local me, ttl = ARGV[1], tonumber(ARGV[2])
redis.call('ZADD', KEYS[1], now + ttl, me)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local target = math.ceil((#ARGV - 2) / redis.call('ZCARD', KEYS[1]))
local mine, free, asked = {}, {}, {}
for at = 3, #ARGV do asked[ARGV[at]] = true end
local leases = redis.call('HGETALL', KEYS[2])
for at = 1, #leases, 2 do
  local owner, ends = string.match(leases[at + 1], '^(%S+) (%d+)$')
  if not owner or (owner == me and not asked[leases[at]]) or (owner ~= me and tonumber(ends) <= now) then
    redis.call('HDEL', KEYS[2], leases[at])
  end
end
for at = 3, #ARGV do
  local lease = redis.call('HGET', KEYS[2], ARGV[at])
  local owner, ends = string.match(lease or '', '^(%S+) (%d+)$')
  if owner == me then mine[#mine + 1] = ARGV[at]
  elseif not owner or tonumber(ends) <= now then free[#free + 1] = ARGV[at] end
end
while #mine > target do redis.call('HDEL', KEYS[2], table.remove(mine)) end
while #mine < target and #free > 0 do mine[#mine + 1] = table.remove(free, 1) end
for _, pod in ipairs(mine) do redis.call('HSET', KEYS[2], pod, string.format('%s %d', me, now + ttl)) end
return mine
"""
"""Divides pods among the builders that called lately: gives those that are the caller's for so many milliseconds.

Leases of pods that are no more go too: what has run out, and the caller's own that it does not ask for.
"""

QUIT = """
redis.call('ZREM', KEYS[1], ARGV[1])
for at = 2, #ARGV do
  local lease = redis.call('HGET', KEYS[2], ARGV[at])
  if lease and string.match(lease, '^%S+') == ARGV[1] then redis.call('HDEL', KEYS[2], ARGV[at]) end
end
"""
"""Gives pods back."""
