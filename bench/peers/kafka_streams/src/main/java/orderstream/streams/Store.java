package orderstream.streams;

import java.sql.SQLException;
import java.util.Queue;
import java.util.concurrent.ConcurrentLinkedQueue;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.Record;

/** The rows of all stream threads, and how many orders have been stored with their events published. */
final class Store implements AutoCloseable {
    private final Queue<Rows> opened = new ConcurrentLinkedQueue<>();
    private final ThreadLocal<Rows> mine;
    private long done;
    private double doneAt;

    Store(Job job) {
        mine = ThreadLocal.withInitial(() -> {
            Rows rows = new Rows(job.jdbcUrl(), job.table());
            opened.add(rows);
            return rows;
        });
    }

    /** Returns the last processor: it keeps rows for the next batch. */
    Processor<String, Sale, Void, Void> processor() {
        return new Processor<>() {
            @Override
            public void process(Record<String, Sale> record) {
                mine.get().add(record.value());
            }
        };
    }

    /** Stores what this thread keeps; called before it commits offsets. */
    void flush() {
        mine.get().flush();
    }

    /** Counts what this thread stored: its events are on their topic, for all to read. */
    void published() {
        long count = mine.get().storedSince();
        if (count > 0) {
            double at = Main.now();
            synchronized (this) {
                done += count;
                doneAt = at;
                notifyAll();
            }
        }
    }

    /** Waits until so many orders are done, counted from the start; returns when they were, in seconds since 1970. */
    synchronized double await(long orders, Failure failure) throws InterruptedException {
        while (done < orders) {
            failure.check();
            wait(100);
        }
        return doneAt;
    }

    synchronized long done() {
        return done;
    }

    /** Closes the connections of threads that have ended. */
    @Override
    public void close() throws SQLException {
        for (Rows rows = opened.poll(); rows != null; rows = opened.poll()) {
            rows.close();
        }
    }
}
