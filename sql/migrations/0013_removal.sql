-- Orders that ended long ago can be removed, so that no table grows for ever; what they were sold stays in the ledger.

-- Units sold to orders that were removed: one row a product, with the nil UUID as source. No order writes this movement.
ALTER TYPE movement ADD VALUE 'carried';

-- When another record than its own last brought a known order: sent again, or another order under its id. Told to the half
-- hour; in no index, so that the update stays in place.
ALTER TABLE orders ADD COLUMN met_again_at timestamptz;


-- Take in orders and decide their lines.
--   orders:  one element a new order record, no id twice.
--   lines:   of these orders and, with line_order_n = 0, lines of orders taken in elsewhere; in the order of arrival.
--   gate:    what Redis said: 1 taken, 0 refused, -1 Redis can't say, 2 not ours to decide, only to note, 3 the user has
--            had as many as one may.
--   gate_away: Redis is away, so what it knows about the products changed here becomes void.
CREATE OR REPLACE FUNCTION reserve_batch(
    order_ids uuid[], user_ids text[], payment_methods text[], idempotency_keys text[], placed_ats timestamptz[],
    line_counts int[], source_partitions int[], source_offsets bigint[],
    line_order_ns int[], line_order_ids uuid[], line_product_ids text[], line_quantities int[], line_gates int[],
    gate_away boolean,
    OUT at timestamptz,
    OUT each_order_known boolean[],          -- was there before; null: none was
    OUT each_order_reused boolean[],         -- was there before and is another order: user, method or lines differ; null: none
    OUT each_order_created_at timestamptz[], -- null: all of them now, at `at`
    OUT each_line_reason text[],             -- null: held, now or before; else why not; 'pending' if not decided here
    OUT each_line_price bigint[],
    OUT each_line_known boolean[],           -- was decided before; null: none was
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT limited_ids text[], OUT limited_users text[], OUT limited_units bigint[]   -- of limited products: who has how many
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    wanted    text[];
    current   text := NULL;
    available bigint := 0;
    noted     boolean[];
    twins     int[] := '{}';
    again_ids uuid[] := '{}';
    inserted  int;
    expected  int;
    line      record;
    plain     boolean;
    who       text;
    asked_ids   text[] := '{}';              -- lines of limited products: product, user
    asked_users text[] := '{}';
BEGIN
    at := now();
    each_order_known := array_fill(false, ARRAY[cardinality(order_ids)]);
    each_order_reused := each_order_known;
    each_order_created_at := array_fill(at, ARRAY[cardinality(order_ids)]);
    each_line_known := array_fill(false, ARRAY[cardinality(line_order_ids)]);
    noted := each_line_known;
    each_line_reason := array_fill('pending'::text, ARRAY[cardinality(line_order_ids)]);
    each_line_price := array_fill(NULL::bigint, ARRAY[cardinality(line_order_ids)]);

    -- Orders that were taken in before: the same record again, or another order under the same id?
    FOR line IN
        SELECT t.n, o.created_at, o.user_id = user_ids[t.n] AND o.payment_method = payment_methods[t.n]
               AND o.line_count = line_counts[t.n] AS same,
               (o.source_partition, o.source_offset) <> (source_partitions[t.n], source_offsets[t.n])
               AND coalesce(o.met_again_at < at - interval '30 minutes', true) AS again
        FROM unnest(order_ids) WITH ORDINALITY t (id, n) JOIN orders o ON o.order_id = t.id
    LOOP
        each_order_known[line.n] := true;
        each_order_reused[line.n] := NOT line.same;
        each_order_created_at[line.n] := line.created_at;
        IF line.again THEN
            again_ids := again_ids || order_ids[line.n];
        END IF;
    END LOOP;

    -- A known order that another record brings: as long as Kafka has that one, the order must stay. Whoever reads the record
    -- of it again changes nothing here, so a replay writes as little as before.
    IF again_ids <> '{}' THEN
        PERFORM FROM orders o WHERE o.order_id = ANY (again_ids) ORDER BY o.order_id FOR UPDATE;
        UPDATE orders o SET met_again_at = at WHERE o.order_id = ANY (again_ids);
        GET DIAGNOSTICS inserted = ROW_COUNT;
        IF inserted <> cardinality(again_ids) THEN
            RAISE EXCEPTION 'an order of this batch was removed meanwhile' USING ERRCODE = '40001';
        END IF;
    END IF;

    -- A batch of new orders only: no line of it was noted before.
    plain := NOT (0 = ANY (line_order_ns) OR true = ANY (each_order_known));

    IF NOT plain THEN
        -- Lines that were noted before, locked in key order; those still pending are decided below.
        FOR line IN
            SELECT t.n, t.order_n, t.quantity = l.quantity AS same, l.state, l.reason, l.unit_price_cents
            FROM order_lines l JOIN unnest(line_order_ns, line_order_ids, line_product_ids, line_quantities) WITH ORDINALITY
                 t (order_n, order_id, product_id, quantity, n) ON l.order_id = t.order_id AND l.product_id = t.product_id
            WHERE t.order_n = 0 OR each_order_known[t.order_n]
            ORDER BY l.order_id, l.product_id FOR UPDATE OF l
        LOOP
            noted[line.n] := true;
            IF line.order_n > 0 AND NOT line.same THEN
                each_order_reused[line.order_n] := true;
            END IF;
            IF line.state <> 'pending' THEN
                each_line_known[line.n] := true;
                each_line_reason[line.n] := line.reason;
                each_line_price[line.n] := line.unit_price_cents;
            END IF;
        END LOOP;
        -- A known order that names a product it did not name before is another order as well.
        FOR line IN
            SELECT DISTINCT t.order_n
            FROM unnest(line_order_ns, line_order_ids, line_product_ids) t (order_n, order_id, product_id)
            WHERE t.order_n > 0 AND each_order_known[t.order_n]
              AND NOT EXISTS (SELECT FROM order_lines l WHERE l.order_id = t.order_id AND l.product_id = t.product_id)
        LOOP
            each_order_reused[line.order_n] := true;
        END LOOP;
    END IF;

    -- A line that stands here twice, with its order (sent again, to the owner of another of its products) and handed over
    -- from that order's first record, is decided once: the second one gets the answer of the first.
    IF 0 = ANY (line_order_ns) AND true = ANY (each_order_known) THEN
        FOR line IN
            WITH t AS (SELECT * FROM unnest(line_order_ns, line_order_ids, line_product_ids, line_gates) WITH ORDINALITY
                       u (order_n, order_id, product_id, gate, n))
            SELECT later.n, first.n AS first_n
            FROM t later JOIN t first ON first.order_id = later.order_id AND first.product_id = later.product_id
            WHERE later.order_n = 0 AND first.order_n > 0 AND first.gate <> 2
        LOOP
            IF NOT each_order_reused[line_order_ns[line.first_n]] THEN
                twins[line.n] := line.first_n;
            END IF;
        END LOOP;
    END IF;

    -- Lock what may change. A product of which Redis refused every line is left alone: that is what Redis is for.
    SELECT array_agg(DISTINCT t.product_id) INTO wanted
    FROM unnest(line_product_ids, line_gates) WITH ORDINALITY t (product_id, gate, n)
    WHERE t.gate IN (1, -1);
    PERFORM FROM stock s WHERE s.product_id = ANY (wanted) ORDER BY s.product_id FOR UPDATE;

    -- New orders, and enough for all of them: each line is held. Most batches are such.
    IF plain THEN
        SELECT coalesce(bool_and(a.enough), true) INTO plain
        FROM (
            SELECT bool_and(t.gate IN (1, -1)) AND s.limit_per_user IS NULL
                   AND sum(t.quantity) <= coalesce(s.on_hand - s.reserved, -1) AS enough
            FROM unnest(line_product_ids, line_quantities, line_gates) t (product_id, quantity, gate)
            LEFT JOIN stock s ON s.product_id = t.product_id
            WHERE t.gate <> 2
            GROUP BY t.product_id, s.on_hand, s.reserved, s.limit_per_user
        ) a;
    END IF;
    IF plain THEN
        SELECT array_agg(CASE WHEN a.gate = 2 THEN 'pending' END), array_agg(a.price_cents)
        INTO each_line_reason, each_line_price
        FROM (
            SELECT t.gate, CASE WHEN t.gate <> 2 THEN p.price_cents END AS price_cents
            FROM unnest(line_product_ids, line_gates) WITH ORDINALITY t (product_id, gate, n)
            LEFT JOIN products p ON p.product_id = t.product_id
            ORDER BY t.n
        ) a;
    ELSE
        -- Decide in the order of arrival, whatever Redis said about the single line: the counts here have the last word.
        FOR line IN
            SELECT t.n, t.product_id, t.quantity, t.order_n, t.gate, s.on_hand - s.reserved AS available, s.limit_per_user,
                   p.price_cents
            FROM unnest(line_order_ns, line_product_ids, line_quantities, line_gates) WITH ORDINALITY
                 t (order_n, product_id, quantity, gate, n)
            LEFT JOIN stock s ON s.product_id = t.product_id AND s.product_id = ANY (wanted)
            LEFT JOIN products p ON p.product_id = s.product_id
            WHERE t.gate <> 2
            ORDER BY t.product_id, t.n
        LOOP
            IF current IS DISTINCT FROM line.product_id THEN
                current := line.product_id;
                available := line.available;
            END IF;
            IF line.limit_per_user IS NOT NULL THEN
                who := CASE WHEN line.order_n > 0 THEN user_ids[line.order_n]
                            ELSE (SELECT o.user_id FROM orders o WHERE o.order_id = line_order_ids[line.n]) END;
                asked_ids := asked_ids || line.product_id;
                asked_users := asked_users || who;
            END IF;
            IF each_line_known[line.n] OR (line.order_n > 0 AND each_order_reused[line.order_n])
               OR (line.order_n = 0 AND NOT noted[line.n]) THEN
                CONTINUE;
            ELSIF twins[line.n] IS NOT NULL THEN
                each_line_known[line.n] := true;
                each_line_reason[line.n] := each_line_reason[twins[line.n]];
                each_line_price[line.n] := each_line_price[twins[line.n]];
            ELSIF line.available IS NULL THEN
                each_line_reason[line.n] := CASE WHEN current = ANY (wanted) THEN 'unknown_product'
                                                 WHEN line.gate = 3 THEN 'user_limit' ELSE 'insufficient_stock' END;
            ELSIF line.quantity <= available THEN
                IF line.limit_per_user IS NOT NULL THEN
                    -- Counted at once, under the product's row lock: of two orders of one user in a batch the second sees the first.
                    INSERT INTO user_units AS u (product_id, user_id, units)
                    SELECT line.product_id, who, line.quantity WHERE line.quantity <= line.limit_per_user
                    ON CONFLICT (product_id, user_id) DO UPDATE SET units = u.units + excluded.units
                    WHERE u.units + excluded.units <= line.limit_per_user;
                    IF NOT FOUND THEN
                        each_line_reason[line.n] := 'user_limit';
                        CONTINUE;
                    END IF;
                END IF;
                available := available - line.quantity;
                each_line_reason[line.n] := NULL;
                each_line_price[line.n] := line.price_cents;
            ELSE
                each_line_reason[line.n] := 'insufficient_stock';
            END IF;
        END LOOP;
    END IF;

    -- Write the orders. One of a single line is decided by that line; one of several is its owner's to decide.
    INSERT INTO orders (order_id, status, reason, line_count, total_cents, source_partition, source_offset, user_id,
                        payment_method, idempotency_key, placed_at, created_at, reserved_at, cancelled_at)
    SELECT o.id,
           CASE WHEN o.line_count > 1 OR l.reason = 'pending' THEN 'CREATED' WHEN l.reason IS NULL THEN 'RESERVED'
                ELSE 'CANCELLED' END::order_status,
           CASE WHEN o.line_count = 1 AND l.reason <> 'pending' THEN l.reason::cancel_reason END,
           o.line_count,
           CASE WHEN o.line_count = 1 AND l.reason IS NULL THEN l.quantity * l.price END,
           o.source_partition, o.source_offset, o.user_id, o.method, o.key, o.placed_at, at,
           CASE WHEN o.line_count = 1 AND l.reason IS NULL THEN at END,
           CASE WHEN o.line_count = 1 AND l.reason <> 'pending' THEN at END
    FROM unnest(order_ids, user_ids, payment_methods, idempotency_keys, placed_ats, line_counts, source_partitions,
                source_offsets, each_order_known) WITH ORDINALITY
         o (id, user_id, method, key, placed_at, line_count, source_partition, source_offset, known, n)
    LEFT JOIN unnest(line_order_ns, line_quantities, each_line_reason, each_line_price)
         l (order_n, quantity, reason, price) ON l.order_n = o.n AND o.line_count = 1
    WHERE NOT o.known
    ORDER BY o.id
    ON CONFLICT (order_id) DO NOTHING;
    GET DIAGNOSTICS inserted = ROW_COUNT;
    SELECT count(*) INTO expected FROM unnest(each_order_known) t (known) WHERE NOT t.known;
    IF inserted <> expected THEN
        -- The partition's former owner, which does not know yet that it is that, took one of them in just now.
        RAISE EXCEPTION 'an order of this batch was taken in by another worker meanwhile' USING ERRCODE = '40001';
    END IF;

    INSERT INTO order_lines (order_id, product_id, quantity, unit_price_cents, state, reason)
    SELECT t.order_id, t.product_id, t.quantity, t.price,
           CASE WHEN t.reason IS NULL THEN 'held' WHEN t.reason = 'pending' THEN 'pending' ELSE 'refused' END::line_state,
           nullif(t.reason, 'pending')::cancel_reason
    FROM unnest(line_order_ns, line_order_ids, line_product_ids, line_quantities, each_line_reason, each_line_price)
         t (order_n, order_id, product_id, quantity, reason, price)
    WHERE t.order_n > 0 AND NOT each_order_known[t.order_n];

    UPDATE order_lines l
    SET state = CASE WHEN t.reason IS NULL THEN 'held' ELSE 'refused' END::line_state,
        reason = t.reason::cancel_reason, unit_price_cents = t.price
    FROM unnest(line_order_ns, line_order_ids, line_product_ids, line_gates, each_line_reason, each_line_price,
                each_line_known) t (order_n, order_id, product_id, gate, reason, price, known)
    WHERE NOT t.known AND t.gate <> 2 AND (t.reason IS NULL OR t.reason <> 'pending')
      AND (t.order_n = 0 OR each_order_known[t.order_n])
      AND l.order_id = t.order_id AND l.product_id = t.product_id AND l.state = 'pending';

    INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
    SELECT t.product_id, t.order_id, 'hold', t.quantity
    FROM unnest(line_order_ids, line_product_ids, line_quantities, each_line_reason, each_line_known)
         t (order_id, product_id, quantity, reason, known)
    WHERE t.reason IS NULL AND NOT t.known;

    WITH changed AS (
        SELECT t.product_id, sum(t.quantity) AS quantity
        FROM unnest(line_product_ids, line_quantities, each_line_reason, each_line_known)
             t (product_id, quantity, reason, known)
        WHERE t.reason IS NULL AND NOT t.known
        GROUP BY t.product_id
    ), held AS (
        UPDATE stock s
        SET reserved = s.reserved + c.quantity, version = s.version + 1,
            gate_generation = s.gate_generation + gate_away::int
        FROM changed c WHERE s.product_id = c.product_id
        RETURNING s.product_id, s.on_hand, s.reserved, s.version, s.gate_generation
    ), counts AS (
        SELECT * FROM held
        UNION ALL
        SELECT s.product_id, s.on_hand, s.reserved, s.version, s.gate_generation
        FROM stock s WHERE s.product_id = ANY (wanted) AND NOT EXISTS (SELECT FROM changed c WHERE c.product_id = s.product_id)
    )
    SELECT coalesce(array_agg(c.product_id), '{}'), array_agg(c.on_hand), array_agg(c.reserved), array_agg(c.version),
           array_agg(c.gate_generation)
    INTO product_ids, on_hands, reserveds, versions, generations FROM counts c;

    IF plain THEN
        each_order_known := NULL;
        each_order_reused := NULL;
        each_order_created_at := NULL;
        each_line_known := NULL;
    END IF;

    IF asked_ids <> '{}' THEN
        SELECT array_agg(u.product_id), array_agg(u.user_id), array_agg(u.units)
        INTO limited_ids, limited_users, limited_units
        FROM (SELECT DISTINCT * FROM unnest(asked_ids, asked_users) t (product_id, user_id)) t
        JOIN user_units u ON u.product_id = t.product_id AND u.user_id = t.user_id;
    END IF;
END $$;


-- Why each of these orders can't be removed; null: it can. What breaks a promise stays, for `verify` and `reconcile` to tell.
--   until        its last change must be before this
--   kafka_until  and before this, from when on the topics have records; null: they have none
--   log_starts   offset of the first record of each partition of `orders`: its own record must be gone
--   busy_ids     orders in the table open-orders; null: not known, so that of any that ended unpaid a charge may be under way
CREATE FUNCTION order_stays(
    ids uuid[], until timestamptz, kafka_until timestamptz, log_starts bigint[], busy_ids uuid[]
) RETURNS TABLE (id uuid, why text) LANGUAGE plpgsql
SET enable_seqscan = off SET plan_cache_mode = force_custom_plan AS $$
BEGIN
    RETURN QUERY
    SELECT o.order_id, CASE
        WHEN o.status NOT IN ('CONFIRMED', 'CANCELLED') THEN 'open'
        WHEN p.status = 'REFUND_DUE' THEN 'refund'
        WHEN o.status = 'CANCELLED' AND l.unsettled THEN 'unsettled'
        WHEN o.order_id = ANY (busy_ids)
          OR (busy_ids IS NULL AND o.status = 'CANCELLED' AND o.reserved_at IS NOT NULL AND p.order_id IS NULL) THEN 'charge'
        WHEN c.at >= until THEN 'recent'
        WHEN coalesce(c.at >= kafka_until, false)
          OR coalesce(o.source_offset >= log_starts[o.source_partition + 1], true) THEN 'kafka'
        WHEN l.limited THEN 'limit'
        WHEN (l.lines = o.line_count AND g.entries = l.entries AND g.fitting = l.entries
              AND (o.reserved_at IS NULL OR o.total_cents = l.total)
              AND CASE WHEN o.status = 'CONFIRMED'
                       THEN l.committed = l.lines AND p.status = 'SUCCESS' AND p.amount_cents = o.total_cents
                       WHEN o.paid_at IS NOT NULL THEN p.status = 'REFUNDED' AND p.amount_cents = o.total_cents
                       ELSE coalesce(p.status IN ('FAILED', 'REFUNDED'), true) AND l.returned = 0 END) IS NOT TRUE
            THEN 'unsound'
        END
    FROM unnest(ids) t (order_id) JOIN orders o ON o.order_id = t.order_id
    LEFT JOIN payments p ON p.order_id = o.order_id
    CROSS JOIN LATERAL (
        SELECT count(*) AS lines, bool_or(x.state IN ('pending', 'held', 'committed')) AS unsettled,
               count(*) FILTER (WHERE x.state = 'committed') AS committed,
               count(*) FILTER (WHERE x.state = 'returned') AS returned,
               sum(x.quantity * x.unit_price_cents) AS total,
               sum(CASE x.state WHEN 'refused' THEN 0 WHEN 'returned' THEN 3 ELSE 2 END) AS entries,
               bool_or(x.state = 'committed' AND s.limit_per_user IS NOT NULL) AS limited
        FROM order_lines x LEFT JOIN stock s ON s.product_id = x.product_id WHERE x.order_id = o.order_id
    ) l
    CROSS JOIN LATERAL (
        SELECT count(*) AS entries, max(y.at) AS at,
               count(*) FILTER (WHERE y.quantity = x.quantity AND y.movement::text = ANY (
                   CASE x.state WHEN 'committed' THEN ARRAY['hold', 'commit'] WHEN 'released' THEN ARRAY['hold', 'release']
                        WHEN 'returned' THEN ARRAY['hold', 'commit', 'return'] END)) AS fitting
        FROM stock_ledger y LEFT JOIN order_lines x ON x.order_id = y.source_id AND x.product_id = y.product_id
        WHERE y.source_id = o.order_id AND y.movement <> 'carried'
    ) g
    CROSS JOIN LATERAL (
        SELECT greatest(o.created_at, o.reserved_at, o.paid_at, o.confirmed_at, o.cancelled_at, o.met_again_at,
                        p.created_at, p.refunded_at, g.at) AS at
    ) c;
END $$;


-- Look at the next `size` orders behind (since, since_id), oldest first, of those taken in before `until`; with `really`
-- remove those that can be, in this transaction. See order_stays for the rest.
-- What the removed ones were sold is carried forward in the ledger, so its sums, and all counts, stay.
CREATE FUNCTION remove_orders(
    since timestamptz, since_id uuid, size int, until timestamptz, kafka_until timestamptz, log_starts bigint[],
    busy_ids uuid[], really boolean,
    OUT looked int,
    OUT last_at timestamptz, OUT last_id uuid,  -- the place to go on behind
    OUT removed int,                            -- or how many would be
    OUT whys text[], OUT numbers int[]          -- why how many stay
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_custom_plan AS $$
DECLARE
    page    uuid[];
    gone    uuid[];
    wanted  uuid[];
    in_use  int := 0;
    sold_of text[];
    moved   text[];
BEGIN
    SELECT coalesce(array_agg(x.order_id ORDER BY x.created_at, x.order_id), '{}'), max(x.created_at)
    INTO page, last_at
    FROM (SELECT o.order_id, o.created_at FROM orders o
          WHERE o.created_at >= since AND (o.created_at, o.order_id) > (since, since_id) AND o.created_at < until
          ORDER BY o.created_at, o.order_id LIMIT size) x;
    looked := cardinality(page);
    last_id := page[looked];

    SELECT array_agg(x.why), array_agg(x.n), coalesce(max(x.ids) FILTER (WHERE x.why IS NULL), '{}')
    INTO whys, numbers, wanted
    FROM (SELECT k.why, count(*)::int AS n, CASE WHEN k.why IS NULL THEN array_agg(k.id) END AS ids
          FROM order_stays(page, until, kafka_until, log_starts, busy_ids) k GROUP BY k.why) x;
    removed := cardinality(wanted);
    numbers := (SELECT array_agg(n ORDER BY i) FROM unnest(whys, numbers) WITH ORDINALITY u (why, n, i) WHERE why IS NOT NULL);
    whys := array_remove(whys, NULL);
    IF NOT really OR removed = 0 THEN
        RETURN;
    END IF;

    -- What somebody works on is left to the next time. Under the lock it is looked at again.
    SELECT coalesce(array_agg(x.order_id), '{}') INTO gone
    FROM (SELECT o.order_id FROM orders o WHERE o.order_id = ANY (wanted) ORDER BY o.order_id FOR UPDATE SKIP LOCKED) x;
    SELECT coalesce(array_agg(k.id), '{}') INTO gone
    FROM order_stays(gone, until, kafka_until, log_starts, busy_ids) k WHERE k.why IS NULL;
    removed := cardinality(gone);
    IF removed < cardinality(wanted) THEN
        whys := whys || 'in use'::text;
        numbers := numbers || (cardinality(wanted) - removed);
    END IF;

    SELECT array_agg(DISTINCT l.product_id) INTO sold_of
    FROM order_lines l WHERE l.order_id = ANY (gone) AND l.state = 'committed';
    SELECT array_agg(DISTINCT g.product_id) INTO moved FROM stock_ledger g WHERE g.source_id = ANY (gone);
    DELETE FROM payments p WHERE p.order_id = ANY (gone);
    DELETE FROM order_lines l WHERE l.order_id = ANY (gone);
    DELETE FROM orders o WHERE o.order_id = ANY (gone);

    -- The ledger of a product is written, compared with its lines and mended under the product's lock. It is taken last, and
    -- held for a moment only.
    PERFORM FROM stock s WHERE s.product_id = ANY (moved) ORDER BY s.product_id FOR UPDATE;
    IF EXISTS (SELECT FROM stock s WHERE s.product_id = ANY (sold_of) AND s.limit_per_user IS NOT NULL) THEN
        RAISE EXCEPTION 'a product of this batch was given a limit meanwhile' USING ERRCODE = '40001';
    END IF;
    WITH entries AS (
        DELETE FROM stock_ledger g WHERE g.source_id = ANY (gone) AND g.movement <> 'carried'
        RETURNING g.product_id, g.movement, g.quantity, g.at
    ), sold AS (
        SELECT e.product_id, max(e.at) AS at,
               coalesce(sum(e.quantity) FILTER (WHERE e.movement = 'commit'), 0)
                 - coalesce(sum(e.quantity) FILTER (WHERE e.movement = 'return'), 0) AS units
        FROM entries e GROUP BY e.product_id
    )
    INSERT INTO stock_ledger AS k (product_id, source_id, movement, quantity, reason, at)
    SELECT s.product_id, '00000000-0000-0000-0000-000000000000', 'carried', s.units, 'sold to orders that were removed', s.at
    FROM sold s WHERE s.units <> 0 ORDER BY s.product_id
    ON CONFLICT (source_id, product_id, movement)
    DO UPDATE SET quantity = k.quantity + excluded.quantity, at = greatest(k.at, excluded.at);
END $$;


-- Forget users of limited products who have nothing. Answers how many; of one product at a time, under its lock.
CREATE FUNCTION forget_users(limited_id text) RETURNS int LANGUAGE plpgsql AS $$
DECLARE
    forgotten int;
BEGIN
    PERFORM FROM stock s WHERE s.product_id = limited_id FOR UPDATE;
    DELETE FROM user_units u WHERE u.product_id = limited_id AND u.units = 0;
    GET DIAGNOSTICS forgotten = ROW_COUNT;
    RETURN forgotten;
END $$;
