-- commit: what is decided about orders that were taken in is written, with all that follows from it, in one transaction.

-- Move orders along, and settle lines at their owner.
--   orders    one element each, sorted by id. `was`: the status that the worker knows; another one there and nothing is written
--             (OS003): read the rows again and decide again.
--             totals: of those that become RESERVED; a total that the row has is never changed.
--             line_states, line_prices, line_reasons: each a whole array as text; null: as it is.
--   moves     of lines at home and of holds: movement, order, product, units.
--   users     who has how many more or fewer of what was moved; counted where the product has a limit.
--   new_holds lines of other homes' orders, decided: h held, x refused, r released before it came.
--   end_holds the same again: c committed, r released, n returned.
--   Short forms: one element of `was`, `statuses`, `payments`, `line_states` or `movements` stands for all; a column of nulls is
--             empty; `move_order_ids` is null where each order moves one line, in the same order.
--   reject    records that are no orders and name an id; told where there is no order under it.
--   wait/over rows of `waiting` to write, and to remove. keep/found: the same of `kept_commands`.
-- Raises OS001 (begin_step), 23514 and OS004 (move_stock), OS002 (count_users).
CREATE FUNCTION settle(
    partitions int[], claims bigint[], sequences bigint[], attempt uuid,
    mark_partitions int[], mark_topics text[], mark_nexts bigint[], mark_acknowledged bigint[], mark_stamps bigint[],
    mark_digests bigint[],
    order_ids uuid[], was order_status[], statuses order_status[], cancel_reasons cancel_reason[], payments payment[],
    charge_ids text[], totals bigint[], line_states text[], line_prices text[], line_reasons text[],
    command_partitions int[], command_offsets bigint[],
    movements movement[], move_order_ids uuid[], move_product_ids text[], move_quantities int[],
    user_product_ids text[], user_ids text[], user_changes int[],
    new_hold_partitions int[], new_hold_order_ids uuid[], new_hold_product_ids text[], new_hold_homes int[],
    new_hold_user_ids text[], new_hold_quantities int[], new_hold_states "char"[], new_hold_reasons cancel_reason[],
    end_hold_order_ids uuid[], end_hold_product_ids text[], end_hold_was "char"[], end_hold_states "char"[],
    wait_homes int[], wait_order_ids uuid[], wait_sinces timestamptz[], wait_reply_tos text[],
    over_homes int[], over_order_ids uuid[],
    keep_partitions int[], keep_order_ids uuid[], keep_offsets bigint[], found_partitions int[], found_order_ids uuid[],
    reject_partitions int[], reject_order_ids uuid[], reject_offsets bigint[], reject_reasons text[], reject_details text[],
    OUT at timestamptz,
    OUT told_rejects bigint[],               -- which of them, from 1
    OUT new_hold_prices bigint[],            -- of each new hold, in the order given; null: not held
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT solds bigint[],
    OUT limited_ids text[], OUT limited_users text[], OUT limited_units bigint[]
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    written       int;
    every_was     order_status := was[1];  -- where a column has one element
    every_status  order_status := statuses[1];
    every_payment payment      := CASE WHEN cardinality(payments) = 1 THEN payments[1] END;
    every_states  "char"[]     := CASE WHEN cardinality(line_states) = 1 THEN line_states[1]::"char"[] END;
BEGIN
    at := now();
    PERFORM begin_step('settle', partitions, claims, sequences, attempt,
                       mark_partitions, mark_topics, mark_nexts, mark_acknowledged, mark_stamps, mark_digests,
                       new_hold_partitions || wait_homes || over_homes || keep_partitions || found_partitions || reject_partitions);

    IF cardinality(order_ids) > 0 THEN
        UPDATE orders o
        SET status = coalesce(t.status, every_status), reason = t.reason,
            payment = coalesce(t.payment, every_payment), charge_id = t.charge_id,
            total_cents = coalesce(o.total_cents, t.total),
            states = coalesce(every_states, t.states::"char"[], o.states), prices = coalesce(t.prices::bigint[], o.prices),
            reasons = coalesce(t.line_reasons::cancel_reason[], o.reasons),
            reserved_at = CASE WHEN coalesce(t.status, every_status) = 'RESERVED'
                THEN coalesce(o.reserved_at, at) ELSE o.reserved_at END,
            paid_at = CASE WHEN coalesce(t.status, every_status) IN ('PAID', 'CONFIRMED')
                THEN coalesce(o.paid_at, at) ELSE o.paid_at END,
            confirmed_at = CASE WHEN coalesce(t.status, every_status) = 'CONFIRMED'
                THEN coalesce(o.confirmed_at, at) ELSE o.confirmed_at END,
            cancelled_at = CASE WHEN coalesce(t.status, every_status) = 'CANCELLED' THEN coalesce(o.cancelled_at, at) END,
            refunded_at = CASE WHEN coalesce(t.payment, every_payment) IN ('REFUNDED', 'VOIDED')
                THEN coalesce(o.refunded_at, at) END,
            command_partition = coalesce(t.command_partition, o.command_partition),
            command_offset = coalesce(t.command_offset, o.command_offset)
        FROM unnest(order_ids, was, statuses, cancel_reasons, payments, charge_ids, totals, line_states, line_prices,
                    line_reasons, command_partitions, command_offsets)
             t (order_id, was, status, reason, payment, charge_id, total, states, prices, line_reasons, command_partition,
                command_offset)
        WHERE o.order_id = t.order_id AND o.status = coalesce(t.was, every_was)
          AND o.home = ANY (partitions);
        GET DIAGNOSTICS written = ROW_COUNT;
        IF written <> cardinality(order_ids) THEN
            RAISE EXCEPTION 'an order of this batch is not in the status that its home knows' USING ERRCODE = 'OS003';
        END IF;
    END IF;

    IF 'REFUSED' = ANY (payments) THEN
        INSERT INTO refusals AS r (order_id, refused_at)
        SELECT t.order_id, at FROM unnest(order_ids, payments) t (order_id, payment)
        WHERE coalesce(t.payment, every_payment) = 'REFUSED'
        ON CONFLICT (order_id) DO UPDATE SET refused_at = excluded.refused_at WHERE r.closed_at IS NULL;
    END IF;

    IF cardinality(new_hold_order_ids) > 0 THEN
        WITH made AS (
            INSERT INTO holds AS h (partition, order_id, product_id, home, user_id, quantity, price, state, reason, held_at,
                                    ended_at)
            SELECT t.partition, t.order_id, t.product_id, t.home, t.user_id, t.quantity,
                   CASE WHEN t.state = 'h' THEN s.price_cents END, t.state, t.reason, at, CASE WHEN t.state <> 'h' THEN at END
            FROM unnest(new_hold_partitions, new_hold_order_ids, new_hold_product_ids, new_hold_homes, new_hold_user_ids,
                        new_hold_quantities, new_hold_states, new_hold_reasons) WITH ORDINALITY
                 t (partition, order_id, product_id, home, user_id, quantity, state, reason, n)
            LEFT JOIN stock s ON s.product_id = t.product_id ORDER BY t.n
            RETURNING h.price
        )
        SELECT array_agg(m.price) INTO new_hold_prices FROM made m;
    END IF;
    IF cardinality(end_hold_order_ids) > 0 THEN
        UPDATE holds h SET state = t.state, ended_at = coalesce(h.ended_at, at), returned_at = CASE h.state WHEN 'c' THEN at END
        FROM unnest(end_hold_order_ids, end_hold_product_ids, end_hold_was, end_hold_states)
             t (order_id, product_id, was, state)
        WHERE h.order_id = t.order_id AND h.product_id = t.product_id AND h.state = t.was
          AND h.partition = ANY (partitions);
        GET DIAGNOSTICS written = ROW_COUNT;
        IF written <> cardinality(end_hold_order_ids) THEN
            RAISE EXCEPTION 'a hold of this batch is not in the state that its owner knows' USING ERRCODE = 'OS003';
        END IF;
    END IF;

    IF cardinality(movements) > 0 THEN
        SELECT * INTO product_ids, on_hands, reserveds, versions, generations, solds
        FROM move_stock('settle', partitions, movements, coalesce(move_order_ids, order_ids), move_product_ids,
                        move_quantities);
        IF cardinality(user_ids) > 0 AND EXISTS (SELECT FROM stock s WHERE s.product_id = ANY (product_ids)
                                                 AND s.limit_per_user IS NOT NULL) THEN
            SELECT * INTO limited_ids, limited_users, limited_units
            FROM count_users(user_product_ids, user_ids, user_changes);
        END IF;
    END IF;

    IF cardinality(wait_order_ids) > 0 THEN
        INSERT INTO waiting (home, order_id, since, reply_to)
        SELECT * FROM unnest(wait_homes, wait_order_ids, wait_sinces, wait_reply_tos)
        ON CONFLICT ON CONSTRAINT waiting_once DO UPDATE SET reply_to = excluded.reply_to;
    END IF;
    IF cardinality(over_order_ids) > 0 THEN
        DELETE FROM waiting w USING unnest(over_homes, over_order_ids) t (home, order_id)
        WHERE w.home = t.home AND w.order_id = t.order_id;
    END IF;
    IF cardinality(found_order_ids) > 0 THEN  -- before the others: another cancel of such an order is kept
        DELETE FROM kept_commands k USING unnest(found_partitions, found_order_ids) t (partition, order_id)
        WHERE k.partition = t.partition AND k.order_id = t.order_id;
    END IF;
    IF cardinality(keep_order_ids) > 0 THEN
        INSERT INTO kept_commands (partition, order_id, "offset")
        SELECT * FROM unnest(keep_partitions, keep_order_ids, keep_offsets) ON CONFLICT DO NOTHING;
    END IF;
    IF cardinality(reject_order_ids) > 0 THEN
        WITH nameless AS (
            SELECT t.* FROM unnest(reject_order_ids, reject_partitions, reject_offsets, reject_reasons, reject_details)
                            WITH ORDINALITY t (order_id, partition, "offset", reason, detail, n)
            WHERE NOT EXISTS (SELECT FROM orders o WHERE o.order_id = t.order_id)
        ), noted AS (
            INSERT INTO rejections (order_id, partition, "offset", reason, detail, rejected_at)
            SELECT n.order_id, n.partition, n."offset", n.reason, n.detail, at FROM nameless n ON CONFLICT DO NOTHING
        )
        SELECT array_agg(n.n) INTO told_rejects FROM nameless n;
    END IF;
END $$;
