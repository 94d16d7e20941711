package orderstream.streams;

import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.SQLException;
import java.sql.Types;
import java.time.Instant;
import java.util.ArrayList;
import java.util.List;

/**
 * Rows of ended sales that wait for the next batch to Postgres; one for each stream thread, with its own connection.
 *
 * <p>A row may come twice, after a crash: the first one stays.
 */
final class Rows implements AutoCloseable {
    /** More rows than these are not kept back for the next commit of offsets. */
    static final int BATCH_MAX = 1024;

    private static final double NANOS = 1e9;

    private final Connection connection;
    private final PreparedStatement insert;
    private final List<Sale> waiting = new ArrayList<>(BATCH_MAX);
    private long stored;

    Rows(String url, String table) {
        try {
            connection = DriverManager.getConnection(url);
            connection.setAutoCommit(false);
            insert = connection.prepareStatement("INSERT INTO " + table
                    + " (order_id, home, source_offset, status, reason, user_id, payment_method, product_id, quantity,"
                    + " price_cents, total_cents, charge_id, created_at, reserved_at, paid_at, confirmed_at,"
                    + " cancelled_at)"
                    + " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, to_timestamp(?),"
                    + " to_timestamp(?), to_timestamp(?), to_timestamp(?), to_timestamp(?)) ON CONFLICT DO NOTHING");
        } catch (SQLException e) {
            throw new IllegalStateException("Postgres: " + e.getMessage(), e);
        }
    }

    void add(Sale sale) {
        waiting.add(sale);
        if (waiting.size() >= BATCH_MAX) {
            flush();
        }
    }

    /** Stores all that waits, durably. */
    void flush() {
        if (waiting.isEmpty()) {
            return;
        }
        try {
            for (Sale sale : waiting) {
                bind(sale);
                insert.addBatch();
            }
            insert.executeBatch();
            connection.commit();
        } catch (SQLException e) {
            throw new IllegalStateException("Postgres: " + e.getMessage(), e);
        }
        stored += waiting.size();
        waiting.clear();
    }

    /** Returns how many were stored since it was asked last. */
    long storedSince() {
        long count = stored;
        stored = 0;
        return count;
    }

    private void bind(Sale sale) throws SQLException {
        Order order = sale.order;
        int n = 0;
        insert.setObject(++n, order.orderId());
        insert.setInt(++n, sale.partition);
        insert.setLong(++n, sale.offset);
        insert.setString(++n, sale.status);
        insert.setString(++n, sale.reason);
        insert.setString(++n, order.userId());
        insert.setString(++n, order.paymentMethod());
        insert.setString(++n, sale.line().productId());
        insert.setInt(++n, sale.line().quantity());
        number(++n, sale.priceCents);
        number(++n, sale.totalCents);
        insert.setString(++n, sale.chargeId);
        time(++n, sale.createdAt);
        time(++n, sale.reservedAt);
        time(++n, sale.paidAt);
        time(++n, sale.confirmedAt);
        time(++n, sale.cancelledAt);
    }

    private void number(int n, Long value) throws SQLException {
        if (value == null) {
            insert.setNull(n, Types.BIGINT);
        } else {
            insert.setLong(n, value);
        }
    }

    /** A number travels in binary; a timestamp would be written, and read, as text. */
    private void time(int n, Instant at) throws SQLException {
        if (at == null) {
            insert.setNull(n, Types.DOUBLE);
        } else {
            insert.setDouble(n, at.getEpochSecond() + at.getNano() / NANOS);
        }
    }

    @Override
    public void close() throws SQLException {
        connection.close();
    }
}
