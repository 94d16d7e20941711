-- `orderstream reconcile --repair` counters an entry of a sale or a receipt that never was by one of the same movement with a
-- negative quantity: the ledger stays append-only, and its sums stay sums.  Nobody else writes such entries.

ALTER TABLE stock_ledger DROP CONSTRAINT stock_ledger_sign;
ALTER TABLE stock_ledger ADD CONSTRAINT stock_ledger_sign CHECK (
    quantity > 0 OR movement = 'adjust' OR (movement = 'initial' AND quantity = 0)
    OR (movement IN ('commit', 'receive') AND quantity < 0 AND reason LIKE 'reconcile: counters %'));
