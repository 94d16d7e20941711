-- What `orderstream reconcile` asks of Postgres, all of one round in one snapshot; then its repairs, each under its lanes.

-- name: clock
-- The first statement of a round: every change that the snapshot has began before this.
SELECT clock_timestamp();

-- name: orders
-- The orders $1, and those taken in at or after $2 (null: none); all where both are null.  `story`: the statuses that an order
-- has had, as bits; `costs`: what its lines cost; `held`: how other owners have these; `waits`: its home takes it up; `kept`: a
-- cancel of it is kept.
SELECT o.order_id::text, o.home, o.source_offset, o.status::text, o.reason::text, o.user_id, o.payment_method, o.total_cents,
       o.payment::text, o.charge_id, o.product_ids, o.quantities, array_to_string(o.states, '') AS states, o.owners,
       1 + 2 * (o.reserved_at IS NOT NULL)::int + 4 * (o.paid_at IS NOT NULL)::int + 8 * (o.confirmed_at IS NOT NULL)::int
         + 16 * (o.cancelled_at IS NOT NULL)::int AS story,
       o.confirmed_at, o.cancelled_at, extract(epoch FROM now() - o.created_at)::float8 AS age_s,
       extract(epoch FROM now() - coalesce(o.cancelled_at, o.confirmed_at, o.paid_at, o.reserved_at, o.created_at))::float8
         AS moved_s,
       CASE WHEN cardinality(o.prices) = 1 THEN o.quantities[1] * o.prices[1]
            ELSE (SELECT sum(l.quantity * l.price)::bigint FROM unnest(o.quantities, o.prices) l (quantity, price)) END AS costs,
       CASE WHEN o.owners IS NOT NULL THEN o.prices END AS prices,
       w.order_id IS NOT NULL AS waits, k.order_id IS NOT NULL AS kept, h.held_ids, h.held_states, h.held_quantities, h.held_prices
FROM orders o
LEFT JOIN waiting w ON w.home = o.home AND w.order_id = o.order_id
LEFT JOIN (SELECT DISTINCT order_id FROM kept_commands) k ON k.order_id = o.order_id
LEFT JOIN LATERAL (SELECT array_agg(x.product_id) AS held_ids, string_agg(x.state::text, '') AS held_states,
                          array_agg(x.quantity) AS held_quantities, array_agg(x.price) AS held_prices
                   FROM holds x WHERE x.order_id = o.order_id AND o.owners IS NOT NULL) h ON true
WHERE ($1::uuid[] IS NULL AND $2::timestamptz IS NULL) OR o.order_id = ANY ($1::uuid[]) OR o.created_at >= $2;

-- name: stray_holds
-- Lines that their owners hold of orders that Postgres does not know with them, and all lines of the orders $1.
SELECT h.order_id::text, h.product_id, h.partition, h.state::text, h.quantity,
       extract(epoch FROM now() - h.held_at)::float8 AS held_s
FROM holds h LEFT JOIN orders o ON o.order_id = h.order_id
WHERE (h.state = 'h' AND (o.order_id IS NULL OR o.owners IS NULL OR h.product_id <> ALL (o.product_ids)))
   OR h.order_id = ANY ($1::uuid[]);

-- name: products
-- The counts of every product, and the sums of its ledger; of these, what was sold to orders that were removed since.
SELECT coalesce(s.product_id, g.product_id) AS product_id, s.initial, s.received, s.adjusted, s.sold, s.reserved, s.on_hand,
       s.version, s.generation, s.owed, s.name, s.price_cents, s.limit_per_user, s.retired, coalesce(g.initials, 0) AS g_initials,
       coalesce(g.initial, 0) AS g_initial, coalesce(g.received, 0) AS g_received, coalesce(g.adjusted, 0) AS g_adjusted,
       coalesce(g.sold, 0) AS g_sold, coalesce(g.reserved, 0) AS g_reserved, coalesce(g.carried, 0) AS carried,
       coalesce((SELECT l.claim FROM lanes l WHERE l.partition = s.partition AND l.lane = 'intake'), 0) AS claim
FROM stock s FULL JOIN (
    SELECT product_id, count(*) FILTER (WHERE movement = 'initial') AS initials,
           (sum(quantity) FILTER (WHERE movement = 'initial'))::bigint AS initial,
           (sum(quantity) FILTER (WHERE movement = 'receive'))::bigint AS received,
           (sum(quantity) FILTER (WHERE movement = 'adjust'))::bigint AS adjusted,
           (coalesce(sum(quantity) FILTER (WHERE movement IN ('commit', 'carried')), 0)
             - coalesce(sum(quantity) FILTER (WHERE movement = 'return'), 0))::bigint AS sold,
           (sum(quantity) FILTER (WHERE movement = 'carried'))::bigint AS carried,
           (coalesce(sum(quantity) FILTER (WHERE movement = 'hold'), 0)
             - coalesce(sum(quantity) FILTER (WHERE movement IN ('commit', 'release')), 0))::bigint AS reserved
    FROM ledger GROUP BY product_id
) g ON g.product_id = s.product_id;

-- name: users
-- Limited products of which the units counted for users are not those of their lines: how many users, and one of them.
SELECT product_id, count(*) AS users, min(user_id) AS user_id,
       (array_agg(must ORDER BY user_id))[1] AS must, (array_agg(counted ORDER BY user_id))[1] AS counted
FROM (
    SELECT coalesce(u.product_id, l.product_id) AS product_id, coalesce(u.user_id, l.user_id) AS user_id,
           coalesce(l.units, 0)::bigint AS must, coalesce(u.units, 0)::bigint AS counted
    FROM user_units u FULL JOIN (
        SELECT l.product_id, l.user_id, sum(l.quantity) AS units
        FROM stock s JOIN stock_lines l ON l.product_id = s.product_id AND l.state IN ('h', 'c')
        WHERE s.limit_per_user IS NOT NULL GROUP BY 1, 2
    ) l ON l.product_id = u.product_id AND l.user_id = u.user_id
) x WHERE must <> counted GROUP BY product_id;

-- name: moves
-- What became of stock commands that move units: those with these ids; $1 null: of all that there are.  Of one that was refused
-- the ledger has nothing; where it has, row and ledger contradict each other, and the topics decide.
SELECT k.command_id::text, k.product_id, k.command, k.change, k.decided_at, k.outcome = 'applied' AS applied
FROM stock_commands k
WHERE k.command NOT IN ('product', 'limit') AND ($1::uuid[] IS NULL OR k.command_id = ANY ($1::uuid[])) AND (k.outcome = 'applied'
    OR NOT EXISTS (SELECT FROM ledger g WHERE g.product_id = k.product_id AND g.command_id = k.command_id));

-- name: catalogue
-- What became of these commands over names, prices and limits, when, and by which record.
SELECT command_id::text, decided_at, "offset", outcome = 'applied' AS applied FROM stock_commands
WHERE command IN ('product', 'limit') AND command_id = ANY ($1::uuid[]);

-- name: youngest
-- The youngest orders that have units of the product $1, until these are all that is owed of it; before them those that are
-- cancelled, and whose units are still to come back.
WITH moved AS MATERIALIZED (
    SELECT DISTINCT unnest(g.order_ids) AS order_id FROM ledger g WHERE g.product_id = $1 AND g.movement = 'hold'
)
SELECT x.order_id::text, x.home, x.status::text, x.created_at, x.total_cents, x.product_ids, x.quantities, s.owed
FROM stock s JOIN LATERAL (
    SELECT o.*, sum(l.quantity) OVER (ORDER BY o.status = 'CANCELLED' DESC, o.created_at DESC, o.order_id) - l.quantity AS before
    FROM moved JOIN orders o USING (order_id)
    CROSS JOIN LATERAL unnest(o.product_ids, o.quantities, o.states) l (product_id, quantity, state)
    WHERE l.product_id = $1 AND (o.status <> 'CANCELLED' OR l.state IN ('l', 'b'))
) x ON x.before < s.owed
WHERE s.product_id = $1 ORDER BY x.status = 'CANCELLED' DESC, x.created_at DESC, x.order_id;

-- name: revoked
-- Of these orders, those of which nothing is left to do: they are cancelled, their units are back, and so is the money, or not.
SELECT order_id::text FROM orders
WHERE order_id = ANY ($1::uuid[]) AND status = 'CANCELLED' AND NOT states && '{g,l,b}'::"char"[]
  AND (payment IS NULL OR payment NOT IN ('REFUND_DUE', 'VOID_DUE'));

-- name: take_lanes
-- Take these partitions over from their workers, which then forget what they know and read it anew.
SELECT count(*) FROM claim_lanes($1::int[]);

-- name: step_lanes
-- Begin a transaction of their settle lanes: the ledger names it.
UPDATE lanes SET sequence = sequence + 1, attempt = gen_random_uuid() WHERE partition = ANY ($1::int[]) AND lane = 'settle';

-- name: lock_orders
SELECT order_id::text, to_json(o)::text AS row FROM orders o WHERE order_id = ANY ($1::uuid[]) ORDER BY o.order_id FOR UPDATE;

-- name: lock_holds
SELECT order_id::text, product_id, state::text, quantity FROM holds h WHERE order_id = ANY ($1::uuid[])
ORDER BY h.order_id, product_id FOR UPDATE;

-- name: moved_for
-- Of the products $2, those of which units were moved for the orders $1: taken in again, these would move them once more.
SELECT u.order_id::text, g.product_id FROM ledger g CROSS JOIN LATERAL unnest(g.order_ids) u (order_id)
JOIN unnest($1::uuid[]) i (order_id) ON i.order_id = u.order_id WHERE g.product_id = ANY ($2::text[])
UNION SELECT order_id::text, product_id FROM holds WHERE order_id = ANY ($1::uuid[]);

-- name: prices
SELECT product_id, price_cents FROM stock WHERE product_id = ANY ($1::text[]);

-- name: drop_orders
DELETE FROM orders WHERE order_id = ANY ($1::uuid[]);

-- name: put_orders
-- Write orders' rows as their records and their events say.
INSERT INTO orders SELECT * FROM json_populate_recordset(NULL::orders, $1::text::json);

-- name: put_hold
-- Write how the owner of a line has it; $9: it had committed it.
INSERT INTO holds AS h (partition, order_id, product_id, home, user_id, quantity, price, state, held_at, ended_at, returned_at)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8::text::"char", now(), CASE WHEN $8 <> 'h' THEN now() END,
        CASE WHEN $8 = 'n' AND $9 THEN now() END)
ON CONFLICT ON CONSTRAINT holds_once DO UPDATE
SET quantity = excluded.quantity, price = coalesce(h.price, excluded.price), state = excluded.state,
    ended_at = CASE WHEN $8 <> 'h' THEN coalesce(h.ended_at, now()) END, returned_at = excluded.returned_at;

-- name: put_hold_prices
-- Have lines of the orders $1 cost at their owners, the partitions $2, what they do at home.
UPDATE holds h SET price = l.price
FROM orders o CROSS JOIN LATERAL unnest(o.product_ids, o.prices) l (product_id, price)
WHERE o.order_id = ANY ($1::uuid[]) AND h.order_id = o.order_id AND h.product_id = l.product_id AND h.price <> l.price
  AND h.partition = ANY ($2::int[]);

-- name: drop_hold
DELETE FROM holds WHERE order_id = $1 AND product_id = $2;

-- name: lock_product
SELECT product_id, partition, initial, received, adjusted, sold, reserved, on_hand, generation, version, limit_per_user,
    coalesce((SELECT l.claim FROM lanes l WHERE l.partition = stock.partition AND l.lane = 'intake'), 0) AS claim
FROM stock WHERE product_id = $1 FOR UPDATE;

-- name: unlike_entries
-- What the ledger of a product has of the movements of lines: `n` more are called for than are there, less those countered.
SELECT order_id::text, movement::text, quantity, at, n FROM (
    SELECT order_id, movement, quantity, at, sum(n)::int AS n FROM (
        SELECT order_id, movement, quantity, at, 1 AS n FROM line_movements WHERE product_id = $1
        UNION ALL
        SELECT u.order_id, g.movement, abs(u.quantity), g.at, -sign(u.quantity)
        FROM ledger g CROSS JOIN LATERAL unnest(g.order_ids, g.quantities) u (order_id, quantity) WHERE g.product_id = $1
    ) m GROUP BY order_id, movement, quantity, at
) d WHERE n <> 0;

-- name: write_entry
-- An entry in the ledger of a product, of the transaction of its settle lane: for people and deliveries where $4 is null.
INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, order_ids, quantities, command_id, reason, at)
SELECT l.partition, l.lane, l.sequence, $2, $3::text::movement, $6, $4::uuid[], $5::int[],
       CASE WHEN $4 IS NULL THEN gen_random_uuid() END, $7, coalesce($8, now())
FROM lanes l WHERE l.partition = $1 AND l.lane = 'settle';

-- name: write_commands
-- Stock commands of a product that its ledger does not have: $3 ids, $4 commands, $5 units asked for, $6 units
-- moved, $7 reasons, $8 who gave them.
WITH missing AS (
    SELECT c.* FROM unnest($3::uuid[], $4::text[], $5::bigint[], $6::bigint[], $7::text[], $8::text[])
                    c (id, command, quantity, change, reason, actor)
    WHERE c.change <> 0 AND NOT EXISTS (SELECT FROM ledger g WHERE g.product_id = $2 AND g.command_id = c.id)
), decided AS (
    INSERT INTO stock_commands (command_id, partition, product_id, command, quantity, reason, actor, outcome, change, decided_at)
    SELECT m.id, $1, $2, m.command, m.quantity, m.reason, m.actor, 'applied', m.change, now() FROM missing m ON CONFLICT DO NOTHING
)
INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, command_id, reason, actor, at)
SELECT l.partition, l.lane, l.sequence, $2, CASE m.command WHEN 'receive' THEN 'receive' ELSE 'adjust' END::movement, m.change,
       m.id, nullif(m.reason, ''), m.actor, now()
FROM missing m JOIN lanes l ON l.partition = $1 AND l.lane = 'settle' RETURNING 1;

-- name: ledger_sums
-- The sums of a product's ledger. Judged are, of the commands, those written before $2 or named in $3 but for those named in
-- $4; and what countered them, whoever wrote it.
SELECT coalesce(sum(quantity) FILTER (WHERE movement = 'initial'), 0)::bigint AS initial,
       count(*) FILTER (WHERE movement = 'initial') AS initials,
       coalesce(sum(quantity) FILTER (WHERE movement = 'receive'), 0)::bigint AS received,
       coalesce(sum(quantity) FILTER (WHERE movement = 'adjust'), 0)::bigint AS adjusted,
       coalesce(sum(quantity) FILTER (WHERE movement = 'receive' AND judged), 0)::bigint AS received_judged,
       coalesce(sum(quantity) FILTER (WHERE movement = 'adjust' AND judged), 0)::bigint AS adjusted_judged,
       coalesce(sum(sale), 0)::bigint AS sold,
       coalesce(sum(sale) FILTER (WHERE at < $2 OR reason LIKE 'reconcile: %'), 0)::bigint AS sold_judged,
       (coalesce(sum(quantity) FILTER (WHERE movement = 'hold'), 0)
         - coalesce(sum(quantity) FILTER (WHERE movement IN ('commit', 'release')), 0))::bigint AS reserved
FROM (SELECT *, CASE WHEN movement IN ('commit', 'carried') THEN quantity WHEN movement = 'return' THEN -quantity END AS sale,
             (at < $2 OR command_id = ANY ($3::uuid[]) OR reason LIKE 'reconcile: counters %')
               AND (command_id = ANY ($4::uuid[])) IS NOT TRUE AS judged
      FROM ledger WHERE product_id = $1) g;

-- name: try_turn
-- Take the turn to repair the pipeline $1 until the end of this transaction, if no other run has it.
SELECT pg_try_advisory_xact_lock(hashtext('orderstream reconcile'), hashtext($1));

-- name: take_turn
-- Wait for it.
SELECT pg_advisory_xact_lock(hashtext('orderstream reconcile'), hashtext($1));

-- name: set_stock
UPDATE stock SET initial = $2, received = $3, adjusted = $4, sold = $5, reserved = $6, on_hand = $7, version = version + 1
WHERE product_id = $1;

-- name: bump_generation
UPDATE stock SET generation = generation + 1 WHERE product_id = $1 RETURNING on_hand, reserved, version, generation;

-- name: note_run
INSERT INTO reconcile_runs (at, resumed, records, seconds, orders, products, open_orders, drift, unrepaired)
VALUES (clock_timestamp(), $1, $2, $3, $4, $5, $6, $7::jsonb, $8::jsonb);

-- name: forget_runs
-- All but the newest $1.
DELETE FROM reconcile_runs WHERE at < (SELECT at FROM reconcile_runs ORDER BY at DESC OFFSET $1 - 1 LIMIT 1);
