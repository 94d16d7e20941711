-- How each stock command was decided, and products changed over HTTP.

-- The last decision on a command.  Who repeats one is told it from here; a refused command that is sent again to the topic,
-- out of the dead letters, is decided again.
CREATE TABLE stock_commands (
    command_id uuid PRIMARY KEY,
    product_id text     NOT NULL,
    command    movement NOT NULL CONSTRAINT stock_commands_move CHECK (command IN ('receive', 'adjust')),
    quantity   bigint   NOT NULL,
    reason     text     NOT NULL,
    outcome    text     NOT NULL
        CONSTRAINT stock_commands_outcome CHECK (outcome IN ('applied', 'unknown_product', 'insufficient_stock')),
    decided_at timestamptz NOT NULL
);

-- As in 0002, and it notes each decision.
CREATE OR REPLACE FUNCTION stock_batch(
    command_ids uuid[], command_product_ids text[], commands text[], quantities bigint[], reasons text[],
    gate_away boolean,
    OUT each_outcome text[],                 -- applied, known, unknown_product, insufficient_stock
    OUT product_ids text[], OUT on_hands bigint[], OUT reserveds bigint[], OUT versions bigint[], OUT generations bigint[],
    OUT solds bigint[]
) LANGUAGE plpgsql SET enable_seqscan = off SET plan_cache_mode = force_generic_plan AS $$
DECLARE
    c record;
BEGIN
    each_outcome := array_fill('known'::text, ARRAY[cardinality(command_ids)]);
    PERFORM FROM stock s WHERE s.product_id = ANY (command_product_ids) ORDER BY s.product_id FOR UPDATE;
    FOR c IN
        SELECT t.*, s.product_id IS NOT NULL AS found
        FROM unnest(command_ids, command_product_ids, commands, quantities, reasons) WITH ORDINALITY
             t (command_id, product_id, command, quantity, reason, n)
        LEFT JOIN stock s ON s.product_id = t.product_id ORDER BY t.n
    LOOP
        IF NOT c.found THEN
            each_outcome[c.n] := 'unknown_product';
        ELSIF EXISTS (SELECT FROM stock_ledger g WHERE g.source_id = c.command_id AND g.movement IN ('receive', 'adjust')) THEN
            CONTINUE;
        ELSIF c.quantity < 0 AND EXISTS (SELECT FROM stock s WHERE s.product_id = c.product_id
                                         AND s.on_hand - s.reserved + c.quantity < 0) THEN
            each_outcome[c.n] := 'insufficient_stock';
        ELSE
            INSERT INTO stock_ledger (product_id, source_id, movement, quantity, reason)
            VALUES (c.product_id, c.command_id, c.command::movement, c.quantity, nullif(c.reason, ''));
            UPDATE stock s
            SET on_hand = s.on_hand + c.quantity,
                received = s.received + CASE WHEN c.command = 'receive' THEN c.quantity ELSE 0 END,
                adjusted = s.adjusted + CASE WHEN c.command = 'adjust' THEN c.quantity ELSE 0 END,
                version = s.version + 1, gate_generation = s.gate_generation + gate_away::int
            WHERE s.product_id = c.product_id;
            each_outcome[c.n] := 'applied';
        END IF;
    END LOOP;
    -- A refusal that is told again after the command was applied under another product changes nothing.
    INSERT INTO stock_commands AS k (command_id, product_id, command, quantity, reason, outcome, decided_at)
    SELECT DISTINCT ON (t.command_id) t.command_id, t.product_id, t.command::movement, t.quantity, t.reason, t.outcome, now()
    FROM unnest(command_ids, command_product_ids, commands, quantities, reasons, each_outcome) WITH ORDINALITY
         t (command_id, product_id, command, quantity, reason, outcome, n)
    WHERE t.outcome <> 'known'
    ORDER BY t.command_id, t.outcome = 'applied' DESC, t.n DESC
    ON CONFLICT (command_id) DO UPDATE
    SET product_id = excluded.product_id, command = excluded.command, quantity = excluded.quantity,
        reason = excluded.reason, outcome = excluded.outcome, decided_at = excluded.decided_at
    WHERE k.outcome <> 'applied';

    SELECT coalesce(array_agg(s.product_id), '{}'), array_agg(s.on_hand), array_agg(s.reserved), array_agg(s.version),
           array_agg(s.gate_generation), array_agg(s.sold)
    INTO product_ids, on_hands, reserveds, versions, generations, solds
    FROM stock s WHERE s.product_id = ANY (command_product_ids);
END $$;


-- Create a product without units, or change one. Answers whether it is new. Orders held before keep their price.
CREATE FUNCTION put_product(id text, new_name text, new_price bigint) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE
    fresh boolean;
BEGIN
    INSERT INTO products AS p (product_id, name, price_cents) VALUES (id, new_name, new_price)
    ON CONFLICT (product_id) DO UPDATE SET name = excluded.name, price_cents = excluded.price_cents
    RETURNING p.xmax = 0 INTO fresh;
    IF fresh THEN
        INSERT INTO stock (product_id, on_hand, initial) VALUES (id, 0, 0);
        INSERT INTO stock_ledger (product_id, source_id, movement, quantity) VALUES (id, gen_random_uuid(), 'initial', 0);
    END IF;
    RETURN fresh;
END $$;
