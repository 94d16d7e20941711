-- What makes a Postgres good that was set back: restored, or a standby without the last moments.  Called by
-- agents/setback.py while no worker writes; these functions write rows of all partitions.

-- Note that Postgres was set back: whoever has claimed a lane is refused from now on, and all have to wait for the fold.
-- Claims and sequences become greater than any that was lost, since both grow more slowly than a clock of milliseconds.
-- Answers false where somebody else has noted it already: `known` is how many there were when it was found.
CREATE FUNCTION note_set_back(known int) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    now_ms bigint := extract(epoch FROM clock_timestamp()) * 1000;
BEGIN
    UPDATE pipeline SET set_backs = set_backs + 1 WHERE set_backs = known;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    INSERT INTO lanes (partition, lane)
    SELECT n, k.lane FROM pipeline p, generate_series(0, p.partitions - 1) n, unnest(enum_range(NULL::lane)) k (lane)
    ORDER BY n, k.lane ON CONFLICT DO NOTHING;
    PERFORM FROM lanes l ORDER BY l.partition, l.lane FOR UPDATE;
    UPDATE lanes SET claim = greatest(claim + 1, now_ms), sequence = greatest(sequence + 1, now_ms);
    RETURN true;
END $$;


-- Have the orders of these homes that are not over wait, so that they are taken up: their records may be acknowledged, or gone.
-- Answers how many did not wait yet.
CREATE FUNCTION have_wait(homes int[]) RETURNS bigint LANGUAGE sql AS $$
    WITH found AS (
        INSERT INTO waiting (home, order_id, since)
        SELECT o.home, o.order_id, o.created_at FROM orders o
        WHERE o.home = ANY (homes) AND (o.status < 'CONFIRMED' OR o.payment IN ('REFUND_DUE', 'VOID_DUE')
                                        OR (o.owners IS NOT NULL AND o.states && '{a,g,l,b}'::"char"[]))
        ON CONFLICT DO NOTHING RETURNING 1
    )
    SELECT count(*) FROM found
$$;


-- What the fold reads: what was told of an order, the order as it came in, cancels that may be lost.  Filled from the topics.
CREATE FUNCTION begin_fold() RETURNS void LANGUAGE sql AS $$
    CREATE TEMP TABLE fold_told (
        order_id uuid, home int, created_at timestamptz, reserved_at timestamptz, paid_at timestamptz,
        confirmed_at timestamptz, cancelled_at timestamptz, total_cents bigint, charge_id text, reason text, prices bigint[]
    ) ON COMMIT DROP;
    CREATE TEMP TABLE fold_came (
        order_id uuid, home int, source_offset bigint, user_id text, payment_method text, idempotency_key text,
        placed_at timestamptz, product_ids text[], quantities int[], owners int[]
    ) ON COMMIT DROP;
    CREATE TEMP TABLE fold_cancelled (order_id uuid) ON COMMIT DROP;
$$;


-- Work out how far each order has to go, and what that moves: fold_moving an order, fold_lines a line of it, fold_holds a line
-- that its owner has to bring forward, fold_moves a movement of units.  Orders move forward, never back.
CREATE FUNCTION plan_fold() RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DROP TABLE IF EXISTS pg_temp.fold_moving, pg_temp.fold_lines, pg_temp.fold_holds, pg_temp.fold_moves;

    CREATE TEMP TABLE fold_moving ON COMMIT DROP AS
    SELECT DISTINCT ON (t.order_id)
           t.*, o.order_id IS NULL AS is_new, x.status, o.states AS before, NULL::"char"[] AS states,
           t.paid_at IS NOT NULL OR t.confirmed_at IS NOT NULL OR o.paid_at IS NOT NULL AS is_paid,
           false AS is_untold, t.reason IN ('unknown_product', 'insufficient_stock', 'user_limit') AS is_refused,
           coalesce(o.user_id, c.user_id) AS user_id, coalesce(o.product_ids, c.product_ids) AS product_ids,
           coalesce(o.quantities, c.quantities) AS quantities,
           CASE WHEN o.order_id IS NULL THEN c.owners ELSE o.owners END AS owners
    FROM fold_told t
    LEFT JOIN orders o ON o.order_id = t.order_id
    LEFT JOIN fold_came c ON c.order_id = t.order_id AND c.home = t.home
    CROSS JOIN LATERAL (SELECT CASE WHEN t.cancelled_at IS NOT NULL THEN 'CANCELLED' WHEN t.confirmed_at IS NOT NULL THEN 'CONFIRMED'
                                    WHEN t.paid_at IS NOT NULL THEN 'PAID' WHEN t.reserved_at IS NOT NULL THEN 'RESERVED'
                                    ELSE 'CREATED' END::order_status) x (status)
    WHERE x.status > coalesce(o.status, 'CREATED') AND t.home = coalesce(o.home, c.home)
      AND NOT EXISTS (SELECT FROM removed_orders r WHERE r.order_id = t.order_id)
    ORDER BY t.order_id, x.status DESC;

    CREATE TEMP TABLE fold_lines ON COMMIT DROP AS
    SELECT m.order_id, m.home, m.user_id, l.n, l.product_id, l.quantity, f.owner, f.is_foreign, l.before::text,
           m.is_new AND m.reserved_at IS NOT NULL AND NOT f.is_foreign AS was_held,
           CASE WHEN m.status = 'RESERVED' THEN 'h'
                WHEN m.status = 'CONFIRMED' THEN 'c'
                WHEN m.status = 'PAID' THEN CASE WHEN f.is_foreign AND l.before IS DISTINCT FROM 'c' THEN 'g' ELSE 'c' END
                WHEN l.before IN ('x', 'r', 'n') THEN l.before::text
                WHEN m.is_paid THEN CASE WHEN f.is_foreign THEN 'b' ELSE 'n' END
                WHEN m.is_new AND m.is_refused THEN 'x'
                ELSE CASE WHEN f.is_foreign THEN 'l' ELSE 'r' END END AS after
    FROM fold_moving m
    CROSS JOIN LATERAL unnest(m.product_ids, m.quantities, m.before, m.owners) WITH ORDINALITY
          l (product_id, quantity, before, owner, n)
    CROSS JOIN LATERAL (SELECT coalesce(l.owner, m.home), coalesce(l.owner, m.home) <> m.home) f (owner, is_foreign);
    UPDATE fold_moving m SET states = l.states
    FROM (SELECT order_id, array_agg(after::"char" ORDER BY n) AS states FROM fold_lines GROUP BY order_id) l
    WHERE l.order_id = m.order_id;
    UPDATE fold_moving m SET status = 'CONFIRMED', confirmed_at = now(), is_untold = true  -- with its last line, as a stage does
    WHERE m.status = 'PAID' AND 'c' = ALL (m.states);

    CREATE TEMP TABLE fold_holds ON COMMIT DROP AS
    SELECT l.*, h.state::text AS was, w.state AS state
    FROM (SELECT * FROM fold_lines
          UNION ALL  -- what home wants back already: its owner may have given the units to others in what got lost
          SELECT o.order_id, o.home, o.user_id, l.n, l.product_id, l.quantity, l.owner, true, l.state::text, false, l.state::text
          FROM waiting w JOIN orders o ON o.order_id = w.order_id AND o.home = w.home
          CROSS JOIN LATERAL unnest(o.product_ids, o.quantities, o.states, o.owners) WITH ORDINALITY
                l (product_id, quantity, state, owner, n)
          WHERE o.owners IS NOT NULL AND l.state IN ('l', 'b')
            AND NOT EXISTS (SELECT FROM fold_moving m WHERE m.order_id = o.order_id)) l
    LEFT JOIN holds h ON h.order_id = l.order_id AND h.product_id = l.product_id
    CROSS JOIN LATERAL (SELECT CASE l.after WHEN 'c' THEN 'c' WHEN 'l' THEN 'r' WHEN 'b' THEN 'n' ELSE 'h' END) w (state)
    WHERE l.is_foreign AND l.after IN ('h', 'g', 'c', 'l', 'b') AND h.state::text IS DISTINCT FROM w.state
      AND NOT (w.state = 'h' AND coalesce(h.state = 'c', false)) AND NOT (w.state = 'r' AND coalesce(h.state IN ('x', 'n'), false));

    CREATE TEMP TABLE fold_moves ON COMMIT DROP AS
    SELECT x.movement::movement, l.owner, l.order_id, l.product_id, l.user_id, l.quantity,
           l.quantity * x.held AS held, l.quantity * x.had AS had
    FROM (SELECT owner, order_id, product_id, user_id, quantity, before, after, was_held FROM fold_lines WHERE NOT is_foreign
          UNION ALL SELECT owner, order_id, product_id, user_id, quantity, was, state, false FROM fold_holds) l
    CROSS JOIN LATERAL (SELECT coalesce(l.before IN ('h', 'c'), false)) b (has_units)
    CROSS JOIN LATERAL (VALUES  -- held: of what is free; had: what a user has
        ('hold', 1, 1, NOT b.has_units AND (l.after IN ('h', 'c', 'n') OR (l.after = 'r' AND l.was_held))),
        ('commit', 0, 0, l.before IS DISTINCT FROM 'c' AND l.after IN ('c', 'n')),
        ('release', -1, -1, (l.before = 'h' OR l.was_held) AND l.after = 'r'),
        ('return', -1, -1, l.after = 'n')) x (movement, held, had, is_so)
    WHERE x.is_so AND l.before IS DISTINCT FROM l.after AND l.before IS DISTINCT FROM 'n';
    ANALYZE fold_moving, fold_lines, fold_holds, fold_moves;
END $$;


-- Fold what fold_told and fold_came have into the tables, in one transaction.
--   end_*            where each topic's partitions end now.
--   skipped          topics of which nothing before that end is read: what stands there is about holds that may be gone.
--   system, timeline the server that this is now.
-- A line costs what was told: the total over its units, or, of an order of several lines, the price of each. Where that was not
-- told, or does not add up to the total, it costs what its row has, else what the catalogue has now.
-- Where orders were told CONFIRMED of products that the catalogue does not have, unknown_ids has these, and nothing is written.
-- Where a product then has more holds than units, orders that were not told RESERVED end first, then those that were told no
-- more than that; short_ids: where that was not enough. Of these the missing units are owed: no others are sold until as many
-- came in or came back, or somebody has counted.
CREATE FUNCTION fold(
    end_partitions int[], end_topics text[], end_offsets bigint[], skipped text[], this_system text, this_timeline text,
    OUT moved bigint, OUT waiting_now bigint, OUT ended bigint, OUT gone bigint, OUT unknown_ids text[], OUT short_ids text[]
) LANGUAGE plpgsql AS $$
DECLARE
    homes  int[]  := ARRAY(SELECT generate_series(0, p.partitions - 1) FROM pipeline p);
    now_ms bigint := extract(epoch FROM clock_timestamp()) * 1000;
    more   bigint;
    told_too bool := false;
BEGIN
    CREATE INDEX ON fold_told (order_id);
    CREATE INDEX ON fold_came (order_id);
    ANALYZE fold_told, fold_came;
    PERFORM FROM lanes l ORDER BY l.partition, l.lane FOR UPDATE;
    waiting_now := have_wait(homes);
    -- A cancel that is read again after the fold would give units back of which the fold may have said that they were missing.
    UPDATE fold_told t SET cancelled_at = now(), reason = 'cancelled_by_user'
    FROM fold_cancelled c WHERE c.order_id = t.order_id AND t.cancelled_at IS NULL;
    INSERT INTO fold_told (order_id, home, cancelled_at, reason)
    SELECT DISTINCT o.order_id, o.home, now(), 'cancelled_by_user'
    FROM fold_cancelled c JOIN orders o ON o.order_id = c.order_id
    WHERE o.status <> 'CANCELLED' AND NOT EXISTS (SELECT FROM fold_told t WHERE t.order_id = c.order_id);
    SELECT count(*) INTO gone FROM fold_told t
    WHERE t.created_at IS NOT NULL AND coalesce(t.reserved_at, t.paid_at, t.confirmed_at, t.cancelled_at) IS NOT NULL
      AND NOT EXISTS (SELECT FROM orders o WHERE o.order_id = t.order_id)
      AND NOT EXISTS (SELECT FROM fold_came c WHERE c.order_id = t.order_id)
      AND NOT EXISTS (SELECT FROM removed_orders r WHERE r.order_id = t.order_id);
    ended := 0;
    LOOP
        PERFORM plan_fold();
        SELECT array_agg(DISTINCT m.product_id) INTO unknown_ids FROM fold_moves m
        WHERE NOT EXISTS (SELECT FROM stock s WHERE s.product_id = m.product_id);
        IF unknown_ids IS NOT NULL THEN
            RETURN;
        END IF;
        DROP TABLE IF EXISTS pg_temp.fold_short;
        CREATE TEMP TABLE fold_short ON COMMIT DROP AS
        SELECT s.product_id, sum(m.held) - min(s.on_hand - s.reserved) AS missing
        FROM fold_moves m JOIN stock s ON s.product_id = m.product_id
        GROUP BY s.product_id HAVING sum(m.held) > min(s.on_hand - s.reserved);
        EXIT WHEN NOT EXISTS (SELECT FROM fold_short);
        INSERT INTO fold_told (order_id, home, created_at, cancelled_at, reason)
        SELECT DISTINCT x.order_id, x.home, x.created_at, now(), 'insufficient_stock'
        FROM (SELECT y.*, s.missing,
                     sum(y.quantity) OVER (PARTITION BY y.product_id ORDER BY y.created_at DESC, y.order_id) - y.quantity AS before
              FROM fold_short s JOIN (
                  SELECT o.order_id, o.home, o.created_at, l.product_id, l.quantity
                  FROM waiting w JOIN orders o ON o.order_id = w.order_id AND o.home = w.home
                  CROSS JOIN LATERAL unnest(o.product_ids, o.quantities, o.states, o.owners) l (product_id, quantity, state, owner)
                  WHERE o.status IN ('CREATED', 'RESERVED')
                    AND CASE WHEN coalesce(l.owner, o.home) = o.home THEN l.state = 'h'
                             ELSE EXISTS (SELECT FROM holds h WHERE h.order_id = o.order_id AND h.product_id = l.product_id
                                                                AND h.state = 'h') END
                    AND NOT EXISTS (SELECT FROM fold_moving m WHERE m.order_id = o.order_id)
                    AND (told_too OR NOT EXISTS (SELECT FROM fold_told t
                                                 WHERE t.order_id = o.order_id AND t.reserved_at IS NOT NULL))
                  UNION ALL
                  SELECT m.order_id, m.home, coalesce(m.created_at, m.reserved_at), l.product_id, l.quantity
                  FROM fold_moving m JOIN fold_lines l ON l.order_id = m.order_id WHERE told_too AND m.status = 'RESERVED'
              ) y ON y.product_id = s.product_id) x
        WHERE x.before < x.missing;
        GET DIAGNOSTICS more = ROW_COUNT;
        ended := ended + more;
        EXIT WHEN more = 0 AND told_too;
        told_too := told_too OR more = 0;
    END LOOP;

    WITH missed AS (
        UPDATE stock s
        SET on_hand = s.on_hand + f.missing, adjusted = s.adjusted + f.missing, owed = s.owed + f.missing, version = s.version + 1
        FROM fold_short f WHERE s.product_id = f.product_id RETURNING s.partition, s.product_id, f.missing
    ), noted AS (
        INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, command_id, reason, at)
        SELECT m.partition, 'settle', l.sequence, m.product_id, 'adjust', m.missing, gen_random_uuid(),
               'sold before Postgres was set back', now()
        FROM missed m JOIN lanes l ON l.partition = m.partition AND l.lane = 'settle'
    )
    SELECT array_agg(m.product_id) INTO short_ids FROM missed m;
    PERFORM move_stock('settle', homes, array_agg(m.movement), array_agg(m.order_id), array_agg(m.product_id),
                       array_agg(m.quantity))
    FROM fold_moves m HAVING count(*) > 0;
    WITH change AS (
        SELECT m.product_id, m.user_id, sum(m.had) AS units
        FROM fold_moves m JOIN stock s ON s.product_id = m.product_id AND s.limit_per_user IS NOT NULL GROUP BY 1, 2
    ), more AS (
        INSERT INTO user_units AS u (product_id, user_id, units)
        SELECT c.product_id, c.user_id, c.units FROM change c WHERE c.units > 0
        ON CONFLICT ON CONSTRAINT user_units_once DO UPDATE SET units = u.units + excluded.units
    )
    UPDATE user_units u SET units = u.units + c.units
    FROM change c WHERE c.units < 0 AND u.product_id = c.product_id AND u.user_id = c.user_id;

    INSERT INTO orders (order_id, home, source_offset, status, user_id, payment_method, idempotency_key, placed_at, product_ids,
                        quantities, prices, states, reasons, owners, created_at)
    SELECT m.order_id, m.home, c.source_offset, 'CREATED', c.user_id, c.payment_method, c.idempotency_key, c.placed_at,
           c.product_ids, c.quantities, array_fill(NULL::bigint, ARRAY[cardinality(c.product_ids)]), m.states,
           CASE WHEN m.is_refused THEN array_fill(m.reason::cancel_reason, ARRAY[cardinality(c.product_ids)]) END, c.owners,
           coalesce(m.created_at, m.reserved_at, m.paid_at, m.confirmed_at, m.cancelled_at)
    FROM fold_moving m JOIN fold_came c ON c.order_id = m.order_id AND c.home = m.home WHERE m.is_new ORDER BY m.order_id;
    UPDATE orders o
    SET status = m.status, states = m.states, reason = m.reason::cancel_reason, charge_id = coalesce(m.charge_id, o.charge_id),
        prices = CASE WHEN x.total IS NOT NULL THEN x.prices ELSE o.prices END, total_cents = x.total,
        payment = CASE WHEN m.status IN ('PAID', 'CONFIRMED') THEN 'SUCCESS'
                       WHEN m.status <> 'CANCELLED' THEN o.payment
                       WHEN x.total = 0 THEN CASE WHEN m.is_paid THEN 'REFUNDED'::payment END
                       WHEN m.is_paid THEN 'REFUND_DUE' ELSE 'VOID_DUE' END,
        reserved_at = x.reserved_at, paid_at = x.paid_at, confirmed_at = coalesce(o.confirmed_at, m.confirmed_at),
        cancelled_at = m.cancelled_at
    FROM fold_moving m CROSS JOIN LATERAL (
        SELECT coalesce(p.paid_at, m.paid_at, m.confirmed_at) AS paid_at,
               coalesce(p.reserved_at, m.reserved_at, m.paid_at, m.confirmed_at) AS reserved_at,
               CASE WHEN m.total_cents IS NULL THEN l.prices
                    WHEN cardinality(p.quantities) = 1 THEN ARRAY[m.total_cents / p.quantities[1]]
                    WHEN cardinality(p.quantities) = cardinality(m.prices) AND m.total_cents = l.told THEN m.prices
                    ELSE l.prices END AS prices,
               coalesce(p.total_cents, m.total_cents,
                        CASE WHEN coalesce(p.reserved_at, m.reserved_at, m.paid_at, m.confirmed_at) IS NOT NULL THEN l.total END)
                   AS total
        FROM orders p, LATERAL (
            SELECT array_agg(coalesce(u.price, s.price_cents) ORDER BY u.n) FILTER (WHERE u.quantity IS NOT NULL) AS prices,
                   sum(u.quantity * coalesce(u.price, s.price_cents))::bigint AS total, sum(u.quantity * u.told) AS told
            FROM unnest(p.product_ids, p.quantities, p.prices, m.prices) WITH ORDINALITY
                 u (product_id, quantity, price, told, n)
            LEFT JOIN stock s ON s.product_id = u.product_id) l
        WHERE p.order_id = m.order_id) x
    WHERE o.order_id = m.order_id;
    GET DIAGNOSTICS moved = ROW_COUNT;
    INSERT INTO holds AS h (partition, order_id, product_id, home, user_id, quantity, price, state, held_at, ended_at, returned_at)
    SELECT f.owner, f.order_id, f.product_id, f.home, f.user_id, f.quantity,
           CASE WHEN f.was IS NOT NULL OR f.state <> 'r' THEN coalesce(o.prices[f.n], s.price_cents) END, f.state::"char", now(),
           CASE WHEN f.state <> 'h' THEN now() END, CASE WHEN f.state = 'n' THEN now() END
    FROM fold_holds f JOIN stock s ON s.product_id = f.product_id JOIN orders o ON o.order_id = f.order_id
    ORDER BY f.order_id, f.product_id
    ON CONFLICT ON CONSTRAINT holds_once DO UPDATE
    SET state = excluded.state, reason = NULL, price = coalesce(h.price, excluded.price), returned_at = excluded.returned_at,
        held_at = CASE WHEN h.price IS NULL THEN excluded.held_at ELSE h.held_at END,
        ended_at = CASE h.state WHEN 'c' THEN h.ended_at ELSE excluded.ended_at END;
    INSERT INTO holds (partition, order_id, product_id, home, user_id, quantity, state, reason, held_at, ended_at)
    SELECT l.owner, l.order_id, l.product_id, l.home, l.user_id, l.quantity, 'x', m.reason::cancel_reason, now(), now()
    FROM fold_lines l JOIN fold_moving m ON m.order_id = l.order_id WHERE l.is_foreign AND l.after = 'x'
    ORDER BY l.order_id, l.product_id ON CONFLICT DO NOTHING;
    WITH written AS (  -- the ledger names what moved a line by the time that the line's row has of it
        DELETE FROM ledger g WHERE g.at = now() AND g.order_ids IS NOT NULL RETURNING g.*
    )
    INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, order_ids, quantities, at)
    SELECT w.partition, w.lane, w.sequence, w.product_id, w.movement, sum(u.quantity), array_agg(u.order_id),
           array_agg(u.quantity), coalesce(m.at, w.at)
    FROM written w CROSS JOIN LATERAL unnest(w.order_ids, w.quantities) u (order_id, quantity)
    LEFT JOIN line_movements m ON m.order_id = u.order_id AND m.product_id = w.product_id AND m.movement = w.movement
    GROUP BY w.partition, w.lane, w.sequence, w.product_id, w.movement, coalesce(m.at, w.at);

    waiting_now := waiting_now + have_wait(homes);
    INSERT INTO waiting (home, order_id, since) SELECT m.home, m.order_id, now() FROM fold_moving m WHERE m.is_untold
    ON CONFLICT DO NOTHING;
    UPDATE stock s SET generation = greatest(s.generation + 1, now_ms);
    INSERT INTO marks AS m (partition, topic, next_offset, stamp, digest, floor, set_back)
    SELECT t.partition, t.topic, CASE WHEN t.topic = ANY (skipped) THEN t.next ELSE 0 END, 0, -1, t.next, p.folded
    FROM unnest(end_partitions, end_topics, end_offsets) t (partition, topic, next), pipeline p
    ON CONFLICT ON CONSTRAINT marks_once DO UPDATE
    SET floor = excluded.floor, next_offset = greatest(m.next_offset, excluded.next_offset),
        digest = CASE WHEN excluded.next_offset > m.next_offset THEN -1 ELSE m.digest END;
    UPDATE pipeline SET folded = set_backs, system = this_system, timeline = this_timeline;
END $$;


-- Begin a topic's partitions again where another log stands than was read, or records were removed unread.
CREATE FUNCTION begin_marks(begin_partitions int[], begin_topics text[], begin_offsets bigint[]) RETURNS void LANGUAGE sql AS $$
    UPDATE marks m SET next_offset = t.next, acknowledged = t.next, digest = -1, floor = least(m.floor, t.next)
    FROM unnest(begin_partitions, begin_topics, begin_offsets) t (partition, topic, next)
    WHERE m.partition = t.partition AND m.topic = t.topic
$$;
