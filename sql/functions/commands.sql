-- commit: people and deliveries move stock.

-- Apply stock commands in the order given, in a step of the settle lane.
--   receive adds units, adjust adds or removes them, set makes the units on hand so many: the difference is fixed once.
--   each_outcome: applied, known (decided before: nothing changes), reused (its id stands for another command),
--   unknown_product, insufficient_stock (it would leave less than is reserved).
-- A refused one that comes again is decided again.
-- Raises OS001 (begin_step), OS005 where a product is of another partition.
CREATE FUNCTION apply_stock_commands(
    partitions int[], claims bigint[], sequences bigint[], attempt uuid,
    mark_partitions int[], mark_topics text[], mark_nexts bigint[], mark_acknowledged bigint[], mark_stamps bigint[],
    mark_digests bigint[],
    command_ids uuid[], command_product_ids text[], commands text[], quantities bigint[], reasons text[],
    OUT at timestamptz, OUT each_outcome text[],
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT solds bigint[],
    OUT limited_ids text[], OUT limited_users text[], OUT limited_units bigint[]
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    c      record;
    before record;
    moved  bigint;
    owner  int;
BEGIN
    at := now();
    each_outcome := array_fill('known'::text, ARRAY[cardinality(command_ids)]);
    PERFORM begin_step('settle', partitions, claims, sequences, attempt,
                       mark_partitions, mark_topics, mark_nexts, mark_acknowledged, mark_stamps, mark_digests, '{}');
    INSERT INTO stock_commands (command_id, partition, product_id, command, quantity, reason, outcome, change, decided_at)
    SELECT DISTINCT ON (t.command_id) t.command_id, coalesce(s.partition, partitions[1]), t.product_id, t.command, t.quantity,
           t.reason, 'unknown_product', 0, at
    FROM unnest(command_ids, command_product_ids, commands, quantities, reasons) WITH ORDINALITY
         t (command_id, product_id, command, quantity, reason, n)
    LEFT JOIN stock s ON s.product_id = t.product_id
    ORDER BY t.command_id, t.n
    ON CONFLICT DO NOTHING;
    PERFORM FROM stock s WHERE s.product_id = ANY (command_product_ids) AND s.partition = ANY (partitions)
    ORDER BY s.product_id FOR UPDATE;
    IF EXISTS (SELECT FROM stock s WHERE s.product_id = ANY (command_product_ids) AND s.partition <> ALL (partitions)) THEN
        RAISE EXCEPTION 'units of a product of another partition' USING ERRCODE = 'OS005';
    END IF;
    FOR c IN
        SELECT * FROM unnest(command_ids, command_product_ids, commands, quantities, reasons) WITH ORDINALITY
             t (command_id, product_id, command, quantity, reason, n) ORDER BY n
    LOOP
        SELECT k.product_id = c.product_id AND k.command = c.command AND k.quantity = c.quantity AS same, k.outcome INTO before
        FROM stock_commands k WHERE k.command_id = c.command_id;
        IF before.outcome = 'applied' OR NOT before.same THEN
            each_outcome[c.n] := CASE WHEN before.same THEN 'known' ELSE 'reused' END;
            CONTINUE;
        END IF;
        UPDATE stock s
        SET on_hand = CASE c.command WHEN 'set' THEN c.quantity ELSE s.on_hand + c.quantity END,
            received = s.received + CASE c.command WHEN 'receive' THEN c.quantity ELSE 0 END,
            adjusted = s.adjusted + CASE c.command WHEN 'receive' THEN 0 WHEN 'set' THEN c.quantity - s.on_hand
                                                   ELSE c.quantity END,
            version = s.version + 1
        FROM (SELECT b.product_id, b.on_hand FROM stock b WHERE b.product_id = c.product_id) old
        WHERE s.product_id = old.product_id
          AND CASE c.command WHEN 'set' THEN c.quantity ELSE s.on_hand + c.quantity END >= s.reserved
        RETURNING s.on_hand - old.on_hand, s.partition INTO moved, owner;
        IF FOUND THEN
            each_outcome[c.n] := 'applied';
            IF moved <> 0 THEN
                INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, command_id, reason, at)
                SELECT owner, 'settle', l.sequence, c.product_id,
                       CASE c.command WHEN 'receive' THEN 'receive' ELSE 'adjust' END::movement, moved, c.command_id,
                       nullif(c.reason, ''), now()
                FROM lanes l WHERE l.partition = owner AND l.lane = 'settle';
            END IF;
        ELSE
            moved := 0;
            each_outcome[c.n] := CASE WHEN EXISTS (SELECT FROM stock s WHERE s.product_id = c.product_id)
                                      THEN 'insufficient_stock' ELSE 'unknown_product' END;
        END IF;
        UPDATE stock_commands k SET outcome = each_outcome[c.n], change = moved, decided_at = at
        WHERE k.command_id = c.command_id;
    END LOOP;
    SELECT array_agg(s.product_id), array_agg(s.on_hand), array_agg(s.reserved), array_agg(s.version), array_agg(s.generation),
           array_agg(s.sold)
    INTO product_ids, on_hands, reserveds, versions, generations, solds
    FROM stock s WHERE s.product_id = ANY (command_product_ids);
END $$;
