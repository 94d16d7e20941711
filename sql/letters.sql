-- What was done about dead letters: read and noted. A letter is named by partition, offset and time, three arrays in step.

-- name: handlings
-- What was done about these letters; open ones are left out.
SELECT a.letter_partition, a.letter_offset, a.letter_at, a.action::text, a.why, a.value, a.begun_at, a.done_at
FROM letter_actions a JOIN unnest($1::int[], $2::bigint[], $3::timestamptz[]) l (partition, "offset", at)
     ON (a.letter_partition, a.letter_offset, a.letter_at) = (l.partition, l."offset", l.at);

-- name: claim
-- Note that these letters are being retried, each with the bytes ($4) that replace its own; of two who claim one, one does.
INSERT INTO letter_actions (letter_partition, letter_offset, letter_at, action, value)
SELECT l.partition, l."offset", l.at, 'retry', l.value
FROM unnest($1::int[], $2::bigint[], $3::timestamptz[], $4::bytea[]) l (partition, "offset", at, value)
ORDER BY 1, 2, 3 ON CONFLICT DO NOTHING;

-- name: claim_again
-- The same, although something was done about them.
INSERT INTO letter_actions (letter_partition, letter_offset, letter_at, action, value)
SELECT l.partition, l."offset", l.at, 'retry', l.value
FROM unnest($1::int[], $2::bigint[], $3::timestamptz[], $4::bytea[]) l (partition, "offset", at, value)
ORDER BY 1, 2, 3
ON CONFLICT ON CONSTRAINT letter_actions_once
DO UPDATE SET action = 'retry', why = NULL, value = excluded.value, begun_at = now(), done_at = NULL;

-- name: hold
-- The same as handlings, the rows locked until their records are produced; those that another retry has locked are left out.
SELECT a.letter_partition, a.letter_offset, a.letter_at, a.action::text, a.why, a.value, a.begun_at, a.done_at
FROM letter_actions a JOIN unnest($1::int[], $2::bigint[], $3::timestamptz[]) l (partition, "offset", at)
     ON (a.letter_partition, a.letter_offset, a.letter_at) = (l.partition, l."offset", l.at)
FOR UPDATE OF a SKIP LOCKED;

-- name: done
-- Their records are produced, and acknowledged by all replicas.
UPDATE letter_actions a SET done_at = clock_timestamp()
FROM unnest($1::int[], $2::bigint[], $3::timestamptz[]) l (partition, "offset", at)
WHERE (a.letter_partition, a.letter_offset, a.letter_at) = (l.partition, l."offset", l.at);

-- name: drop
-- Note that these letters are not to be sent again ($4: why); returns those that were open.
INSERT INTO letter_actions (letter_partition, letter_offset, letter_at, action, why, done_at)
SELECT l.partition, l."offset", l.at, 'drop', $4::text, now()
FROM unnest($1::int[], $2::bigint[], $3::timestamptz[]) l (partition, "offset", at)
ORDER BY 1, 2, 3 ON CONFLICT DO NOTHING RETURNING letter_partition, letter_offset, letter_at;

-- name: drop_again
-- The same, although something was done about them.
INSERT INTO letter_actions (letter_partition, letter_offset, letter_at, action, why, done_at)
SELECT l.partition, l."offset", l.at, 'drop', $4::text, now()
FROM unnest($1::int[], $2::bigint[], $3::timestamptz[]) l (partition, "offset", at)
ORDER BY 1, 2, 3
ON CONFLICT ON CONSTRAINT letter_actions_once
DO UPDATE SET action = 'drop', why = excluded.why, value = NULL, begun_at = now(), done_at = now()
RETURNING letter_partition, letter_offset, letter_at;
