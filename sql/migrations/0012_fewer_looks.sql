-- The stage functions with fewer looks at the same row: what one statement read, the next one finds by its place, and a batch
-- in which nothing is out of the ordinary is not asked about twice. What they answer is as before.


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
               AND o.line_count = line_counts[t.n] AS same
        FROM unnest(order_ids) WITH ORDINALITY t (id, n) JOIN orders o ON o.order_id = t.id
    LOOP
        each_order_known[line.n] := true;
        each_order_reused[line.n] := NOT line.same;
        each_order_created_at[line.n] := line.created_at;
    END LOOP;

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


-- Move orders along, as their owner decided. Steps apply in this order, whatever the order of the rows:
--   reserve   all lines of a many-product order are held: CREATED → RESERVED, at this total
--   charged   the provider took the money: RESERVED → PAID; for an order that has ended: a refund is due
--   declined  it did not: RESERVED → CANCELLED
--   cancel    CREATED or RESERVED → CANCELLED, for the reason given
--   revoke    its customer cancels it: CREATED, RESERVED, PAID or CONFIRMED → CANCELLED; of a charge a refund is due
-- A step that does not fit the order's status changes nothing; the answer tells where the order stands.
-- source_offsets: where the record stands that the step follows from, on `reservations`, or on `order-commands` for a
-- revoke and an expiry.
DROP FUNCTION decide_batch(uuid[], text[], text[], bigint[], text[], bigint[]);
CREATE FUNCTION decide_batch(
    order_ids uuid[], steps text[], reasons text[], amounts bigint[], charge_ids text[], source_offsets bigint[],
    OUT all_paid_at timestamptz,             -- each of them was charged and is paid just now; the arrays are null then
    OUT each_status text[],                  -- null: no such order
    OUT each_reason text[],
    OUT each_payment text[],
    OUT each_changed boolean[],              -- by this very row
    OUT each_reserved_at timestamptz[],
    OUT each_moved_at timestamptz[],         -- when it was paid, or else cancelled
    OUT each_revoked boolean[]               -- it was paid before it was cancelled
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    at      timestamptz := now();
    line    record;
    paid_ns int[];
BEGIN
    each_changed := array_fill(false, ARRAY[cardinality(order_ids)]);
    PERFORM FROM orders o WHERE o.order_id = ANY (order_ids) ORDER BY o.order_id FOR UPDATE;

    IF 'reserve' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT * FROM unnest(order_ids, steps, amounts, source_offsets) WITH ORDINALITY
                       u (order_id, step, amount, source_offset, n) WHERE u.step = 'reserve')
            UPDATE orders o SET status = 'RESERVED', reserved_at = at, total_cents = t.amount,
                                reservation_offset = t.source_offset
            FROM t WHERE o.order_id = t.order_id AND o.status = 'CREATED' RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
    END IF;

    IF 'charged' = ANY (steps) THEN
        -- A reserved order has no payment yet: both are written at once, without another look.
        WITH t AS (SELECT * FROM unnest(order_ids, steps, amounts, charge_ids, source_offsets) WITH ORDINALITY
                   u (order_id, step, amount, charge_id, source_offset, n) WHERE u.step = 'charged'),
        moved AS (
            UPDATE orders o SET status = 'PAID', paid_at = at,
                                reservation_offset = coalesce(t.source_offset, o.reservation_offset)
            FROM t WHERE o.order_id = t.order_id AND o.status = 'RESERVED'
            RETURNING t.n, o.order_id, t.amount, t.charge_id
        ), paid AS (
            INSERT INTO payments (order_id, status, amount_cents, charge_id)
            SELECT m.order_id, 'SUCCESS', m.amount, m.charge_id FROM moved m
        )
        SELECT array_agg(m.n) INTO paid_ns FROM moved m;
        IF cardinality(paid_ns) = cardinality(order_ids) THEN
            all_paid_at := at;  -- most batches are such
            RETURN;
        END IF;
        FOR line IN SELECT m.n FROM unnest(paid_ns) m (n) LOOP
            each_changed[line.n] := true;
        END LOOP;
        INSERT INTO payments (order_id, status, amount_cents, charge_id)
        SELECT o.order_id, 'REFUND_DUE', t.amount, t.charge_id
        FROM unnest(order_ids, steps, amounts, charge_ids) t (order_id, step, amount, charge_id)
        JOIN orders o ON o.order_id = t.order_id
        WHERE t.step = 'charged' AND o.status = 'CANCELLED'
        ON CONFLICT (order_id) DO NOTHING;
    END IF;

    IF 'declined' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT * FROM unnest(order_ids, steps, source_offsets) WITH ORDINALITY
                       u (order_id, step, source_offset, n) WHERE u.step = 'declined')
            UPDATE orders o SET status = 'CANCELLED', reason = 'payment_declined', cancelled_at = at,
                                reservation_offset = t.source_offset
            FROM t WHERE o.order_id = t.order_id AND o.status = 'RESERVED' RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
        INSERT INTO payments (order_id, status, amount_cents)
        SELECT t.order_id, 'FAILED', t.amount
        FROM unnest(order_ids, steps, amounts) t (order_id, step, amount) JOIN orders o ON o.order_id = t.order_id
        WHERE t.step = 'declined' AND o.status = 'CANCELLED'
        ON CONFLICT (order_id) DO NOTHING;
    END IF;

    IF 'cancel' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT DISTINCT ON (u.order_id) * FROM unnest(order_ids, steps, reasons, source_offsets)
                       WITH ORDINALITY u (order_id, step, reason, source_offset, n)
                       WHERE u.step = 'cancel' ORDER BY u.order_id, u.n)
            UPDATE orders o
            SET status = 'CANCELLED', reason = t.reason::cancel_reason, cancelled_at = at,
                command_offset = CASE WHEN t.reason IN ('expired', 'cancelled_by_user') THEN t.source_offset END,
                reservation_offset = CASE WHEN t.reason IN ('expired', 'cancelled_by_user') THEN o.reservation_offset
                                          ELSE t.source_offset END
            FROM t WHERE o.order_id = t.order_id AND o.status IN ('CREATED', 'RESERVED') RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
    END IF;

    IF 'revoke' = ANY (steps) THEN
        FOR line IN
            WITH t AS (SELECT DISTINCT ON (u.order_id) * FROM unnest(order_ids, steps, source_offsets) WITH ORDINALITY
                       u (order_id, step, source_offset, n) WHERE u.step = 'revoke' ORDER BY u.order_id, u.n)
            UPDATE orders o SET status = 'CANCELLED', reason = 'cancelled_by_user', cancelled_at = at,
                                command_offset = t.source_offset
            FROM t WHERE o.order_id = t.order_id AND o.status <> 'CANCELLED' RETURNING t.n
        LOOP
            each_changed[line.n] := true;
        END LOOP;
        UPDATE payments p SET status = 'REFUND_DUE'
        FROM unnest(order_ids, steps) t (order_id, step)
        WHERE t.step = 'revoke' AND p.order_id = t.order_id AND p.status = 'SUCCESS';
    END IF;

    SELECT array_agg(o.status::text ORDER BY t.n), array_agg(o.reason::text ORDER BY t.n),
           array_agg(p.status::text ORDER BY t.n), array_agg(o.reserved_at ORDER BY t.n),
           array_agg(coalesce(o.paid_at, o.cancelled_at) ORDER BY t.n),
           array_agg(coalesce(o.status = 'CANCELLED' AND o.paid_at IS NOT NULL, false) ORDER BY t.n)
    INTO each_status, each_reason, each_payment, each_reserved_at, each_moved_at, each_revoked
    FROM unnest(order_ids) WITH ORDINALITY t (order_id, n)
    LEFT JOIN orders o ON o.order_id = t.order_id LEFT JOIN payments p ON p.order_id = t.order_id;
END $$;


-- Commit, release or return lines, and confirm the orders whose last line this commits.
--   commit   a held line of an order that is paid is sold
--   release  a held line of an order that ended without being paid is free again
--   return   a line of an order that was cancelled after it was paid: what is sold comes back, what is held is free again
-- A line in another state was settled before. One whose order does not agree (a commit without payment, a release without
-- cancellation) stays as it is, and its order is answered in `misfits`. Of an order that was paid and then cancelled only a
-- return counts: its commits may still be under way, and are no misfits.
CREATE OR REPLACE FUNCTION settle_batch(
    order_ids uuid[], line_product_ids text[], actions text[], source_partitions int[], source_offsets bigint[],
    gate_away boolean,
    OUT at timestamptz,
    OUT confirmed_ids uuid[], OUT confirmed_ats timestamptz[],   -- of all these orders, also those confirmed before; ats is
                                                                 -- null where all of them were confirmed now, at `at`
    OUT returned_ids uuid[], OUT returned_ats timestamptz[],     -- those of which a line is to return and none is left to
    OUT misfits uuid[],
    OUT settled int,
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT solds bigint[],
    OUT limited_ids text[], OUT limited_users text[], OUT limited_units bigint[]   -- of limited products: who has how many
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    s_orders     uuid[];
    s_products   text[];
    s_quantities int[];
    s_moves      text[];
    s_places     bigint[];                   -- partition << 40 | offset, of the settlement's record
    s_states     line_state[];
    s_lines      tid[];                      -- where the rows of the lines stand, and those of their orders
    s_rows       tid[];
    moved        int;
    limited      boolean;
BEGIN
    at := now();
    -- One look at each line and its order. The lock on the order covers its lines: whoever settles one has it.
    SELECT array_agg(x.order_id), array_agg(x.product_id), array_agg(x.quantity), array_agg(x.move), array_agg(x.place),
           array_agg(x.state), array_agg(x.line_row), array_agg(x.order_row)
    INTO s_orders, s_products, s_quantities, s_moves, s_places, s_states, s_lines, s_rows
    FROM (
        SELECT l.order_id, l.product_id, l.quantity, (t.partition::bigint << 40) | t.source_offset AS place,
               CASE WHEN t.action = 'return' AND l.state = 'held' THEN 'release' ELSE t.action END AS move,
               l.state, l.ctid AS line_row, o.ctid AS order_row
        FROM unnest(order_ids, line_product_ids, actions, source_partitions, source_offsets)
             t (order_id, product_id, action, partition, source_offset)
        JOIN orders o ON o.order_id = t.order_id
        JOIN order_lines l ON l.order_id = t.order_id AND l.product_id = t.product_id
        WHERE (l.state = 'held' AND ((t.action = 'commit' AND o.status IN ('PAID', 'CONFIRMED'))
                                     OR (t.action = 'release' AND o.status = 'CANCELLED' AND o.paid_at IS NULL)))
           OR (t.action = 'return' AND l.state IN ('held', 'committed') AND o.status = 'CANCELLED'
               AND o.paid_at IS NOT NULL)
        ORDER BY o.order_id, l.product_id FOR UPDATE OF o
    ) x;
    settled := coalesce(cardinality(s_orders), 0);

    IF settled < cardinality(order_ids) THEN
        SELECT array_agg(DISTINCT o.order_id) INTO misfits
        FROM unnest(order_ids, actions) t (order_id, action) JOIN orders o ON o.order_id = t.order_id
        WHERE NOT ((t.action = 'commit' AND o.status IN ('PAID', 'CONFIRMED'))
                   OR (t.action = 'release' AND o.status = 'CANCELLED')
                   OR (o.status = 'CANCELLED' AND o.paid_at IS NOT NULL));
    END IF;

    IF settled > 0 THEN
        UPDATE order_lines l
        SET state = CASE t.move WHEN 'commit' THEN 'committed' WHEN 'release' THEN 'released' ELSE 'returned' END::line_state
        FROM unnest(s_lines, s_states, s_moves) t (line_row, state, move)
        WHERE l.ctid = t.line_row AND l.state = t.state;
        GET DIAGNOSTICS moved = ROW_COUNT;
        IF moved <> settled THEN
            -- The partition's former owner settled one of them while this one waited for the order's lock.
            RAISE EXCEPTION 'a line of this batch was settled by another worker meanwhile' USING ERRCODE = '40001';
        END IF;

        INSERT INTO stock_ledger (product_id, source_id, movement, quantity)
        SELECT t.product_id, t.order_id, t.move::movement, t.quantity
        FROM unnest(s_orders, s_products, s_quantities, s_moves) t (order_id, product_id, quantity, move);

        WITH done AS (
            UPDATE orders o
            SET lines_committed = o.lines_committed + t.lines,
                status = CASE WHEN o.lines_committed + t.lines = o.line_count THEN 'CONFIRMED' ELSE o.status END,
                confirmed_at = CASE WHEN o.lines_committed + t.lines = o.line_count THEN at END,
                settlement_partition = t.place >> 40, settlement_offset = t.place & ((1::bigint << 40) - 1)
            FROM (SELECT u.order_row, count(*)::int AS lines, max(u.place) AS place
                  FROM unnest(s_rows, s_moves, s_places) u (order_row, move, place)
                  WHERE u.move = 'commit' GROUP BY u.order_row) t
            WHERE o.ctid = t.order_row
            RETURNING o.order_id, o.status
        )
        SELECT array_agg(d.order_id) FILTER (WHERE d.status = 'CONFIRMED'), count(*) INTO confirmed_ids, moved FROM done d;

        IF 'return' = ANY (s_moves) THEN
            UPDATE orders o SET lines_committed = o.lines_committed - t.lines
            FROM (SELECT u.order_id, count(*)::int AS lines FROM unnest(s_orders, s_moves) u (order_id, move)
                  WHERE u.move = 'return' GROUP BY u.order_id) t
            WHERE o.order_id = t.order_id;
        END IF;
    END IF;

    -- Last, so that they are held for a moment only: orders of the same products are being reserved meanwhile.
    PERFORM FROM stock s WHERE s.product_id = ANY (s_products) ORDER BY s.product_id FOR UPDATE;

    WITH moved AS (
        SELECT t.product_id,
               coalesce(sum(t.quantity) FILTER (WHERE t.move <> 'return'), 0) AS unreserved,
               coalesce(sum(t.quantity) FILTER (WHERE t.move = 'commit'), 0)
                 - coalesce(sum(t.quantity) FILTER (WHERE t.move = 'return'), 0) AS sold
        FROM unnest(s_products, s_quantities, s_moves) t (product_id, quantity, move) GROUP BY t.product_id
    ), counts AS (
        UPDATE stock s
        SET on_hand = s.on_hand - m.sold, reserved = s.reserved - m.unreserved, sold = s.sold + m.sold,
            version = s.version + 1, gate_generation = s.gate_generation + gate_away::int
        FROM moved m WHERE s.product_id = m.product_id
        RETURNING s.product_id, s.on_hand, s.reserved, s.version, s.gate_generation, s.sold, s.limit_per_user
    ), untouched AS (  -- settled before, perhaps without Redis having heard of it
        SELECT s.product_id, s.on_hand, s.reserved, s.version, s.gate_generation, s.sold, s.limit_per_user
        FROM stock s WHERE s.product_id = ANY (line_product_ids)
          AND s.product_id <> ALL (coalesce(s_products, '{}'))
    ), all_counts AS (SELECT * FROM counts UNION ALL SELECT * FROM untouched)
    SELECT coalesce(array_agg(c.product_id), '{}'), array_agg(c.on_hand), array_agg(c.reserved), array_agg(c.version),
           array_agg(c.gate_generation), array_agg(c.sold), bool_or(c.limit_per_user IS NOT NULL)
    INTO product_ids, on_hands, reserveds, versions, generations, solds, limited FROM all_counts c;

    IF limited THEN
        UPDATE user_units u SET units = u.units - f.quantity  -- what is free again, or back, its user may order again
        FROM (SELECT t.product_id, o.user_id, sum(t.quantity) AS quantity
              FROM unnest(s_orders, s_products, s_quantities, s_moves) t (order_id, product_id, quantity, move)
              JOIN orders o ON o.order_id = t.order_id WHERE t.move <> 'commit' GROUP BY t.product_id, o.user_id) f
        WHERE u.product_id = f.product_id AND u.user_id = f.user_id;

        SELECT array_agg(u.product_id), array_agg(u.user_id), array_agg(u.units)
        INTO limited_ids, limited_users, limited_units
        FROM (SELECT DISTINCT t.product_id, o.user_id FROM unnest(order_ids, line_product_ids) t (order_id, product_id)
              JOIN orders o ON o.order_id = t.order_id) t
        JOIN user_units u ON u.product_id = t.product_id AND u.user_id = t.user_id;
    END IF;

    IF settled = cardinality(order_ids) THEN
        confirmed_ids := coalesce(confirmed_ids, '{}');
    ELSE
        SELECT coalesce(array_agg(o.order_id), '{}'), array_agg(o.confirmed_at) INTO confirmed_ids, confirmed_ats
        FROM orders o WHERE o.order_id = ANY (order_ids) AND o.status = 'CONFIRMED';
    END IF;

    IF 'return' = ANY (actions) THEN
        SELECT array_agg(o.order_id), array_agg(o.cancelled_at) INTO returned_ids, returned_ats
        FROM orders o
        WHERE o.order_id IN (SELECT t.order_id FROM unnest(order_ids, actions) t (order_id, action) WHERE t.action = 'return')
          AND o.status = 'CANCELLED' AND o.paid_at IS NOT NULL
          AND NOT EXISTS (SELECT FROM order_lines l WHERE l.order_id = o.order_id AND l.state IN ('held', 'committed'));
    END IF;
END $$;
