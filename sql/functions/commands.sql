-- commit: people and deliveries move stock, and manage the catalogue.

-- Apply stock commands in the order given, in a step of the settle lane.
--   receive adds units, adjust adds or removes them, set makes the units on hand so many: the difference is fixed once. Where
--   units are owed, what is added is put against them first; who counts (set) finds what there is, so nothing is owed any more.
--   product sets name and price, or makes a product of the partition in `owners`; `mores`, JSON, what else it sets, and how the
--   product has to be for that; limit is how many units a user may have: the
--   quantity, 0 for any number.
--   actors: who gave them; of a known one the first stays.
--   changes: the differences of those that were decided before Postgres was set back.
--   offsets: where their records stand; null: what is decided may be decided anew where they are read.
--   told: that they were refused, and why, as dead letters tell since before Postgres was set back; null: they do not.
--   each_change: what each applied or known one added or removed.
--   each_outcome: applied, known (decided before: nothing changes), reused (its id stands for another command),
--   unknown_product, product_changed (the product is not as the command says it was), insufficient_stock (it would leave less than is
--   reserved), too_many_units (more than 10^15 on hand: counts
--   stay exact in Redis, and no sum of them overflows).
-- A refused one is decided again where another record brings it; where its own record is read again it stays refused: there is a
-- dead letter of it.
-- Raises OS001 (begin_step), OS005 where a product is of another partition.
CREATE FUNCTION apply_stock_commands(
    partitions int[], claims bigint[], sequences bigint[], attempt uuid,
    mark_partitions int[], mark_topics text[], mark_nexts bigint[], mark_acknowledged bigint[], mark_stamps bigint[],
    mark_digests bigint[],
    command_ids uuid[], owners int[], command_product_ids text[], commands text[], quantities bigint[], names text[],
    prices bigint[], reasons text[], mores text[], changes bigint[], offsets bigint[], told text[], actors text[],
    OUT at timestamptz, OUT each_outcome text[], OUT each_change bigint[],
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT solds bigint[],
    OUT limited_ids text[], OUT limited_users text[], OUT limited_units bigint[]
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    c      record;
    before record;
    moved  bigint;
    owing  bigint;
    closed bigint;
    done   boolean;
    more   jsonb;
    changed boolean;
    most   CONSTANT bigint := 1000000000000000;
BEGIN
    at := now();
    each_outcome := array_fill('known'::text, ARRAY[cardinality(command_ids)]);
    each_change := array_fill(0::bigint, ARRAY[cardinality(command_ids)]);
    PERFORM begin_step('settle', partitions, claims, sequences, attempt,
                       mark_partitions, mark_topics, mark_nexts, mark_acknowledged, mark_stamps, mark_digests, '{}');
    INSERT INTO stock_commands (command_id, partition, product_id, command, quantity, name, price_cents, reason, more,
                                actor, outcome, change, decided_at)
    SELECT DISTINCT ON (t.command_id) t.command_id, t.owner, t.product_id, t.command, t.quantity, t.name, t.price, t.reason,
           t.more, t.actor, 'unknown_product', 0, at
    FROM unnest(command_ids, owners, command_product_ids, commands, quantities, names, prices, reasons, mores, actors)
         WITH ORDINALITY t (command_id, owner, product_id, command, quantity, name, price, reason, more, actor, n)
    ORDER BY t.command_id, t.n
    ON CONFLICT DO NOTHING;
    PERFORM FROM stock s WHERE s.product_id = ANY (command_product_ids) AND s.partition = ANY (partitions)
    ORDER BY s.product_id FOR UPDATE;
    IF EXISTS (SELECT FROM stock s WHERE s.product_id = ANY (command_product_ids) AND s.partition <> ALL (partitions)) THEN
        RAISE EXCEPTION 'units of a product of another partition' USING ERRCODE = 'OS005';
    END IF;
    FOR c IN
        SELECT t.*, t.command = 'set' AND t.change IS NULL AS is_open, coalesce(t.change, t.quantity) AS units
        FROM unnest(command_ids, owners, command_product_ids, commands, quantities, names, prices, reasons, mores, changes,
                    offsets, told, actors)
             WITH ORDINALITY t (command_id, owner, product_id, command, quantity, name, price, reason, more, change, source,
                                refused, actor, n)
        ORDER BY n
    LOOP
        SELECT (k.product_id, k.command, k.quantity, k.name, k.price_cents, k.reason, k.more)
               IS NOT DISTINCT FROM (c.product_id, c.command, c.quantity, c.name, c.price, c.reason, c.more) AS same,
               k.outcome, k.change, CASE WHEN k."offset" = c.source THEN k.outcome ELSE c.refused END AS refused
        INTO before
        FROM stock_commands k WHERE k.command_id = c.command_id;
        IF before.outcome = 'applied' OR NOT before.same THEN
            each_outcome[c.n] := CASE WHEN before.same THEN 'known' ELSE 'reused' END;
            each_change[c.n] := before.change;
            CONTINUE;
        END IF;
        IF before.refused IS NOT NULL THEN
            each_outcome[c.n] := before.refused;
            UPDATE stock_commands k SET outcome = before.refused, decided_at = at, "offset" = c.source
            WHERE k.command_id = c.command_id;
            CONTINUE;
        END IF;
        more := coalesce(c.more::jsonb, '{}');
        changed := more ? 'was' AND nullif(more -> 'was', 'null') IS DISTINCT FROM (
            SELECT jsonb_build_object('name', s.name, 'price_cents', s.price_cents, 'limit_per_user', s.limit_per_user,
                                      'retired', s.retired)
            FROM stock s WHERE s.product_id = c.product_id);
        IF changed THEN
            moved := NULL;
            done := false;
        ELSIF c.command = 'product' THEN
            moved := put_product(c.product_id, c.owner, c.name, c.price)::int;
            done := moved IS NOT NULL;
            IF done AND more ? 'limit_per_user' THEN
                PERFORM set_limit(c.product_id, (more ->> 'limit_per_user')::bigint);
            END IF;
            IF done AND more ? 'retired' THEN
                PERFORM retire(c.product_id, (more ->> 'retired')::boolean);
            END IF;
        ELSIF c.command = 'limit' THEN
            moved := 0;
            done := set_limit(c.product_id, nullif(c.quantity, 0));
        ELSE
            UPDATE stock s
            SET on_hand = CASE WHEN c.is_open THEN c.quantity ELSE s.on_hand + c.units END,
                received = s.received + CASE c.command WHEN 'receive' THEN c.units ELSE 0 END,
                adjusted = s.adjusted + CASE WHEN c.command = 'receive' THEN 0 WHEN c.is_open THEN c.quantity - s.on_hand
                                             ELSE c.units END,
                owed = CASE WHEN c.is_open THEN 0 ELSE s.owed END,
                version = s.version + 1
            FROM (SELECT b.product_id, b.on_hand, b.owed FROM stock b WHERE b.product_id = c.product_id) old
            WHERE s.product_id = old.product_id
              AND CASE WHEN c.is_open THEN c.quantity ELSE s.on_hand + c.units END
                  BETWEEN s.reserved AND greatest(most, s.on_hand)
            RETURNING s.on_hand - old.on_hand, old.owed, old.owed - s.owed INTO moved, owing, closed;
            done := FOUND;
            IF moved <> 0 THEN
                INSERT INTO ledger (partition, lane, sequence, product_id, movement, quantity, command_id, reason, actor, at)
                SELECT c.owner, 'settle', l.sequence, c.product_id,
                       CASE c.command WHEN 'receive' THEN 'receive' ELSE 'adjust' END::movement, moved, c.command_id,
                       nullif(c.reason, ''), c.actor, now()
                FROM lanes l WHERE l.partition = c.owner AND l.lane = 'settle';
            END IF;
            moved := moved + closed;
            IF owing > closed THEN
                PERFORM put_against_owed('settle', ARRAY[c.product_id]);
            END IF;
        END IF;
        each_outcome[c.n] := CASE WHEN done THEN 'applied' WHEN changed THEN 'product_changed' ELSE coalesce(
            (SELECT CASE WHEN CASE WHEN c.is_open THEN c.quantity ELSE s.on_hand + c.units END < s.reserved
                         THEN 'insufficient_stock' ELSE 'too_many_units' END
             FROM stock s WHERE s.product_id = c.product_id), 'unknown_product') END;
        each_change[c.n] := coalesce(moved, 0);
        UPDATE stock_commands k
        SET outcome = each_outcome[c.n], change = each_change[c.n], decided_at = at, "offset" = c.source
        WHERE k.command_id = c.command_id;
    END LOOP;
    SELECT array_agg(s.product_id), array_agg(s.on_hand), array_agg(s.reserved), array_agg(s.version), array_agg(s.generation),
           array_agg(s.sold)
    INTO product_ids, on_hands, reserveds, versions, generations, solds
    FROM stock s WHERE s.product_id = ANY (command_product_ids);
END $$;
