-- Orders that ended long ago are removed, so that no table of orders grows for ever; what they were sold stays in the ledger, and
-- their ids in `removed_orders`.
-- These statements write rows of every partition, in no step: no worker touches an order that stays for none of the reasons
-- below.  Rows of orders are locked first, and skipped where somebody has them; those of stock last, and for a moment.

-- Why each of these orders can't be removed; null: it can.  What breaks a promise stays, for `verify` and `reconcile` to tell.
--   until        its last change must be before this
--   kafka_until  and before this, from when on the topics have records; null: they have none
--   log_starts   offset of the first record of each partition of `orders`: its own record must be gone
CREATE FUNCTION order_stays(ids uuid[], until timestamptz, kafka_until timestamptz, log_starts bigint[])
RETURNS TABLE (id uuid, why text) LANGUAGE sql SET enable_seqscan = off SET plan_cache_mode = force_custom_plan AS $$
    WITH moved AS MATERIALIZED (
        SELECT m.* FROM line_movements m WHERE m.order_id = ANY (ids)
    ), there AS (  -- the ledger's rows of these transactions, each unnested once; one that counters another has negative units
        SELECT g.product_id, g.movement, g.at, u.order_id, abs(u.quantity) AS quantity, sum(sign(u.quantity)) AS times
        FROM (SELECT DISTINCT m.product_id, m.movement, m.at FROM moved m) k
        JOIN ledger g ON g.product_id = k.product_id AND g.movement = k.movement AND g.at = k.at
        CROSS JOIN LATERAL unnest(g.order_ids, g.quantities) u (order_id, quantity)
        GROUP BY g.product_id, g.movement, g.at, u.order_id, abs(u.quantity)
    ), explained AS (
        SELECT m.order_id, bool_and(coalesce(t.times = 1, false)) AS sound
        FROM moved m LEFT JOIN there t USING (order_id, product_id, movement, at, quantity) GROUP BY m.order_id
    ), lines AS (
        SELECT l.order_id, count(*) AS lines, string_agg(l.state::text, '') AS states, max(l.ended_at) AS ended_at,
               max(l.returned_at) AS returned_at, sum(l.quantity * l.price) AS total,
               bool_or(l.state = 'c' AND s.limit_per_user IS NOT NULL) AS limited
        FROM stock_lines l LEFT JOIN stock s ON s.product_id = l.product_id
        WHERE l.order_id = ANY (ids) GROUP BY l.order_id
    )
    SELECT o.order_id, CASE
        WHEN o.status NOT IN ('CONFIRMED', 'CANCELLED') THEN 'open'
        WHEN o.payment IN ('VOID_DUE', 'REFUND_DUE') OR (o.payment = 'REFUSED' AND f.closed_at IS NULL) THEN 'refund'
        WHEN o.states && '{a,g,l,b}'::"char"[] OR l.states ~ CASE o.status WHEN 'CANCELLED' THEN '[hc]' ELSE 'h' END
            THEN 'unsettled'
        WHEN EXISTS (SELECT FROM waiting w WHERE w.home = o.home AND w.order_id = o.order_id) THEN 'waiting'
        WHEN c.at >= until THEN 'recent'
        WHEN coalesce(c.at >= kafka_until, false) OR coalesce(o.source_offset >= log_starts[o.home + 1], true) THEN 'kafka'
        WHEN l.limited THEN 'limit'
        WHEN (l.lines = cardinality(o.product_ids) AND coalesce(e.sound, true)
              AND (o.reserved_at IS NULL OR o.total_cents = l.total)
              AND CASE WHEN o.status = 'CONFIRMED' THEN o.payment = 'SUCCESS' AND l.states ~ '^c+$'
                       WHEN o.paid_at IS NOT NULL THEN o.payment IN ('REFUNDED', 'REFUSED') AND l.states ~ '^n+$'
                       WHEN o.payment IS NULL THEN o.reserved_at IS NULL OR o.total_cents = 0
                       ELSE o.payment IN ('FAILED', 'VOIDED', 'REFUSED') END) IS NOT TRUE THEN 'unsound'
        END
    FROM orders o
    LEFT JOIN lines l ON l.order_id = o.order_id LEFT JOIN explained e ON e.order_id = o.order_id
    LEFT JOIN refusals f ON f.order_id = o.order_id
    CROSS JOIN LATERAL (SELECT greatest(o.created_at, o.reserved_at, o.paid_at, o.confirmed_at, o.cancelled_at, o.refunded_at,
                                        f.closed_at, o.met_again_at, l.ended_at, l.returned_at) AS at) c
    WHERE o.order_id = ANY (ids)
$$;


-- Remove the lines of these orders that other homes' owners have, and what the ledger has of all their lines; what was sold is
-- carried forward, one row a product, so the sums of the ledger, and all counts, stay.
-- Raises 40001 where a limit came between: then call again.
CREATE FUNCTION remove_lines(gone uuid[]) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    -- The ledger of a product is written, compared with its lines and mended under the product's lock.
    PERFORM FROM stock s
    WHERE s.product_id = ANY (ARRAY(SELECT DISTINCT m.product_id FROM line_movements m WHERE m.order_id = ANY (gone)))
    ORDER BY s.product_id FOR UPDATE;
    IF EXISTS (SELECT FROM stock_lines l JOIN stock s ON s.product_id = l.product_id
               WHERE l.order_id = ANY (gone) AND l.state = 'c' AND s.limit_per_user IS NOT NULL) THEN
        RAISE EXCEPTION 'a product of this batch was given a limit meanwhile' USING ERRCODE = '40001';
    END IF;
    WITH moved AS MATERIALIZED (
        SELECT m.product_id, m.movement, m.at, array_agg(m.order_id) AS ids
        FROM line_movements m WHERE m.order_id = ANY (gone) GROUP BY m.product_id, m.movement, m.at
    ), found AS MATERIALIZED (
        SELECT g.ctid AS place, g.product_id, g.movement, g.quantity - k.units AS gone, k.units, k.order_ids, k.quantities
        FROM moved m JOIN ledger g ON g.product_id = m.product_id AND g.at = m.at AND g.movement = m.movement
             AND g.order_ids && m.ids
        CROSS JOIN LATERAL (
            SELECT coalesce(sum(u.quantity), 0) AS units, array_agg(u.order_id) AS order_ids, array_agg(u.quantity) AS quantities
            FROM unnest(g.order_ids, g.quantities) u (order_id, quantity) WHERE u.order_id <> ALL (m.ids)
        ) k
    ), shortened AS (
        UPDATE ledger g SET quantity = f.units, order_ids = f.order_ids, quantities = f.quantities
        FROM found f WHERE g.ctid = f.place AND f.order_ids IS NOT NULL
    ), emptied AS (
        DELETE FROM ledger g USING found f WHERE g.ctid = f.place AND f.order_ids IS NULL
    ), sold AS (  -- the row that carries them forward has the time of its product: so it is found
        SELECT f.product_id, s.partition, s.created_at AS at,
               sum(CASE f.movement WHEN 'commit' THEN f.gone WHEN 'return' THEN -f.gone ELSE 0 END) AS units
        FROM found f JOIN stock s ON s.product_id = f.product_id GROUP BY f.product_id, s.partition, s.created_at
    ), added AS (
        UPDATE ledger g SET quantity = g.quantity + s.units
        FROM sold s WHERE g.product_id = s.product_id AND g.at = s.at AND g.movement = 'carried' RETURNING g.product_id
    )
    INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, reason, at)
    SELECT s.partition, 'settle', 0, s.product_id, 'carried', s.units, 'sold to orders that were removed', s.at
    FROM sold s WHERE s.units > 0 AND s.product_id NOT IN (SELECT a.product_id FROM added a);
    DELETE FROM holds h WHERE h.order_id = ANY (gone);
END $$;


-- Remove lines that owners have of orders that never came, or were removed before: at most those of `size` orders; with
-- `really` false they are counted only.  Lines that have ended before `until`, and before `kafka_until`, from when on the
-- topics have records: no record asks for them again (null: there are none).
-- One that was sold breaks a promise, and stays.  Answers how many lines.
CREATE FUNCTION remove_strays(size int, until timestamptz, kafka_until timestamptz, really boolean) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    gone   uuid[];
    number bigint;
BEGIN
    SELECT array_agg(x.order_id), coalesce(sum(x.lines), 0) INTO gone, number
    FROM (SELECT h.order_id, count(*) AS lines FROM holds h
          WHERE NOT EXISTS (SELECT FROM orders o WHERE o.order_id = h.order_id)
          GROUP BY h.order_id
          HAVING bool_and(h.state IN ('x', 'r') AND h.ended_at < least(until, kafka_until)) LIMIT size) x;
    IF really AND number > 0 THEN
        PERFORM remove_lines(gone);
    END IF;
    RETURN number;
END $$;


-- Look at the next `size` orders behind (since, since_id), oldest first, of those taken in before `until`; with `really`
-- remove those that can be, in this transaction.  See order_stays for the rest.
-- Raises 40001 (remove_lines).
CREATE FUNCTION remove_orders(
    since timestamptz, since_id uuid, size int, until timestamptz, kafka_until timestamptz, log_starts bigint[],
    really boolean,
    OUT looked int,
    OUT last_at timestamptz, OUT last_id uuid,  -- the place to go on behind
    OUT removed int,                            -- or how many would be
    OUT whys text[], OUT numbers int[]          -- why how many stay
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    page   uuid[];
    gone   uuid[];
    wanted uuid[];
BEGIN
    SELECT coalesce(array_agg(x.order_id ORDER BY x.created_at, x.order_id), '{}'), max(x.created_at)
    INTO page, last_at
    FROM (SELECT o.order_id, o.created_at FROM orders o
          WHERE o.created_at >= since AND (o.created_at, o.order_id) > (since, since_id) AND o.created_at < until
          ORDER BY o.created_at, o.order_id LIMIT size) x;
    looked := cardinality(page);
    last_id := page[looked];

    WITH stays AS (SELECT * FROM order_stays(page, until, kafka_until, log_starts))
    SELECT array_agg(x.why), array_agg(x.n),
           coalesce((SELECT array_agg(k.id) FROM stays k WHERE k.why IS NULL), '{}')
    INTO whys, numbers, wanted
    FROM (SELECT k.why, count(*)::int AS n FROM stays k WHERE k.why IS NOT NULL GROUP BY k.why) x;
    removed := cardinality(wanted);
    IF NOT really OR removed = 0 THEN
        RETURN;
    END IF;

    -- What somebody works on is left to the next time.  Under the lock it is looked at again.
    SELECT coalesce(array_agg(x.order_id), '{}') INTO gone
    FROM (SELECT o.order_id FROM orders o WHERE o.order_id = ANY (wanted) ORDER BY o.order_id FOR UPDATE SKIP LOCKED) x;
    SELECT coalesce(array_agg(k.id), '{}') INTO gone
    FROM order_stays(gone, until, kafka_until, log_starts) k WHERE k.why IS NULL;
    removed := cardinality(gone);
    IF removed < cardinality(wanted) THEN
        whys := whys || 'in use'::text;
        numbers := numbers || (cardinality(wanted) - removed);
    END IF;

    PERFORM remove_lines(gone);
    DELETE FROM refusals r WHERE r.order_id = ANY (gone);
    DELETE FROM orders o WHERE o.order_id = ANY (gone);
    INSERT INTO removed_orders (order_id) SELECT unnest(gone);
END $$;
