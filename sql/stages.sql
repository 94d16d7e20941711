-- What the stages ask by name, beside the stage functions.

-- name: home_orders
-- Where these orders stand.
SELECT order_id::text, home, source_offset, status::text, reason::text, user_id, payment_method, product_ids, quantities, prices,
       array_to_string(states, '') AS states, reasons::text[] AS reasons, owners, total_cents, payment::text, charge_id,
       created_at, reserved_at, paid_at, confirmed_at, cancelled_at,
       payment IS NOT DISTINCT FROM 'REFUSED' AND EXISTS (SELECT FROM refusals r WHERE r.order_id = o.order_id
                                                           AND r.closed_at IS NOT NULL) AS is_closed
FROM orders o WHERE order_id = ANY ($1::uuid[]);

-- name: met_again
-- Note of these orders ($1) that a record other than their own, in $2 at $3, has brought their id, or that they are told again
-- (-1): as long as Kafka may have that record, the order stays.  Whatever home it has; told to the half hour.
UPDATE orders o SET met_again_at = now()
FROM unnest($1::uuid[], $2::int[], $3::bigint[]) t (order_id, partition, "offset")
WHERE o.order_id = t.order_id AND (o.home, o.source_offset) <> (t.partition, t."offset")
  AND coalesce(o.met_again_at < now() - interval '30 minutes', true);

-- name: note_removed
-- Remember that these orders were removed, where they are not there: of what Postgres lost only they are known.
INSERT INTO removed_orders (order_id)
SELECT t.order_id FROM unnest($1::uuid[]) t (order_id)
WHERE NOT EXISTS (SELECT FROM orders o WHERE o.order_id = t.order_id) ON CONFLICT DO NOTHING;

-- name: waiting_orders
-- Orders of these homes that are not over and came in at $2 or after, the oldest first; $3 at most.
SELECT order_id::text, reply_to, since FROM waiting WHERE home = ANY ($1::int[]) AND since >= $2 ORDER BY since LIMIT $3;

-- name: still_waiting
-- Of these orders, $1 and $2 homes and ids in step, those that wait.
SELECT w.order_id::text FROM waiting w JOIN unnest($1::int[], $2::uuid[]) t (home, order_id)
     ON w.home = t.home AND w.order_id = t.order_id;

-- name: moved_last
-- The counts of products that the last transactions of these partitions have moved: Redis may not have heard of these.
SELECT DISTINCT s.product_id, s.on_hand, s.reserved, s.version, s.generation, s.limit_per_user IS NOT NULL AS is_limited
FROM lanes l JOIN ledger g ON g.partition = l.partition AND g.at >= l.at - interval '10 seconds'
JOIN stock s ON s.product_id = g.product_id
WHERE l.partition = ANY ($1::int[]);

-- name: holds_of
-- Lines of other homes' orders, as their owner has them; $1 and $2 in step.
SELECT h.order_id::text, h.product_id, h.state::text, h.price, h.reason::text, h.quantity, h.user_id, h.home, h.partition
FROM holds h JOIN unnest($1::uuid[], $2::text[]) t (order_id, product_id)
     ON h.order_id = t.order_id AND h.product_id = t.product_id;

-- name: overdue_orders
-- Orders of these homes that are open for longer than $2, the oldest first; $3 at most.
SELECT o.order_id::text, now() - $2::interval AS before FROM waiting w JOIN orders o ON o.order_id = w.order_id
WHERE w.home = ANY ($1::int[]) AND w.since <= now() - $2::interval AND o.created_at <= now() - $2::interval
  AND o.status IN ('CREATED', 'RESERVED')
ORDER BY w.since LIMIT $3;

-- name: kept_found
-- Kept cancels of these partitions whose order has come; $2 at most.
SELECT k.partition, k.order_id::text, o.home FROM kept_commands k JOIN orders o ON o.order_id = k.order_id
WHERE k.partition = ANY ($1::int[]) LIMIT $2;

-- name: kept_outlived
-- Cancels that these partitions have kept for longer than $2, whose order has not come; $3 at most.
SELECT k.partition, k.order_id::text FROM kept_commands k
WHERE k.partition = ANY ($1::int[]) AND k.kept_at < now() - $2::interval
  AND NOT EXISTS (SELECT FROM orders o WHERE o.order_id = k.order_id) LIMIT $3;

-- name: long_held
-- Lines of other homes' orders that these partitions hold for longer than $2; $3 at most.
SELECT order_id::text, product_id, quantity, home, user_id FROM holds
WHERE partition = ANY ($1::int[]) AND state = 'h' AND held_at <= now() - $2::interval ORDER BY held_at LIMIT $3;

-- name: stock_of
-- The counts and limits of products as they are, without a lock.
SELECT product_id, on_hand, reserved, version, generation, limit_per_user, retired FROM stock WHERE product_id = ANY ($1::text[]);

-- name: units_of
-- What these users have of these products with a limit.
SELECT product_id, user_id, units FROM user_units WHERE product_id = ANY ($1::text[]) AND user_id = ANY ($2::text[]);

-- name: lock_lanes
-- Lock the intake lanes of these partitions, for a transaction that looks before it begins its step.
SELECT FROM lanes WHERE partition = ANY ($1::int[]) AND lane = 'intake' ORDER BY partition FOR UPDATE;


-- name: pipeline_state
-- How often Postgres was set back and made good, how often Redis was another one; on which server it was noted, and which this is.
SELECT p.set_backs, p.folded, p.gates, p.system, c.system_identifier::text AS system_now, w.timeline AS timeline_now,
       coalesce(p.system <> c.system_identifier::text OR p.timeline <> w.timeline, false) AS is_other
FROM pipeline p, pg_control_system() c, left(pg_walfile_name(pg_current_wal_lsn()), 8) w (timeline);

-- name: lock_pipeline
-- The same for who folds, locked; no row: another is at it.
SELECT p.set_backs, p.folded, c.system_identifier::text AS system_now, w.timeline AS timeline_now
FROM pipeline p, pg_control_system() c, left(pg_walfile_name(pg_current_wal_lsn()), 8) w (timeline)
FOR UPDATE OF p SKIP LOCKED;

-- name: note_system
-- Note on which server this database is, where nobody has.
UPDATE pipeline SET system = $1, timeline = $2 WHERE system IS NULL;

-- name: note_set_back
-- Note that Postgres was set back; $1: how often it was before.
SELECT note_set_back($1) AS noted;

-- name: lanes_of
-- The lanes of these partitions.
SELECT partition, lane::text, claim, sequence FROM lanes WHERE partition = ANY ($1::int[]);

-- name: settle_lanes
-- All settle lanes, and when the last transaction of each began.
SELECT partition, claim, sequence, at FROM lanes WHERE lane = 'settle' ORDER BY partition;

-- name: marks_of
-- How far the topics of these partitions have been read.
SELECT * FROM marks WHERE partition = ANY ($1::int[]);

-- name: begin_marks
-- Begin these partitions of topics again.
SELECT begin_marks($1, $2, $3);

-- name: have_wait
-- Have the orders of these homes that are not over wait.
SELECT have_wait($1);

-- name: have_told
-- Have the orders of these homes wait whose records stand at these offsets or behind: what became of them may be untold.
INSERT INTO waiting (home, order_id, since)
SELECT o.home, o.order_id, o.created_at FROM orders o JOIN unnest($1::int[], $2::bigint[]) t (home, done) ON o.home = t.home
WHERE o.source_offset >= t.done ON CONFLICT DO NOTHING;

-- name: note_begun
-- Note what of these partitions of topics is acknowledged, and that they are read from where they have to be since a set-back.
UPDATE marks m SET acknowledged = greatest(m.acknowledged, least(t.acknowledged, m.next_offset)), set_back = $4
FROM unnest($1::int[], $2::text[], $3::bigint[]) t (partition, topic, acknowledged)
WHERE m.partition = t.partition AND m.topic = t.topic AND (m.set_back <> $4 OR m.acknowledged < t.acknowledged);

-- name: fold
-- Fold what was read of the topics into the tables; see functions/fold.sql.
SELECT * FROM fold($1, $2, $3, $4, $5, $6);
