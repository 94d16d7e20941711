package orderstream.streams;

import java.time.Duration;
import java.util.List;
import java.util.Optional;
import java.util.Properties;
import java.util.Set;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import java.util.stream.IntStream;
import org.apache.kafka.clients.consumer.ConsumerConfig;
import org.apache.kafka.clients.producer.ProducerConfig;
import org.apache.kafka.common.serialization.Serdes;
import org.apache.kafka.common.serialization.StringDeserializer;
import org.apache.kafka.common.serialization.UUIDSerializer;
import org.apache.kafka.streams.KafkaStreams;
import org.apache.kafka.streams.StoreQueryParameters;
import org.apache.kafka.streams.StreamsConfig;
import org.apache.kafka.streams.Topology;
import org.apache.kafka.streams.errors.StreamsUncaughtExceptionHandler.StreamThreadExceptionResponse;
import org.apache.kafka.streams.processor.StreamPartitioner;
import org.apache.kafka.streams.state.QueryableStoreTypes;
import org.apache.kafka.streams.state.Stores;

/** The application: its topology, its settings, its life. */
final class Shop implements AutoCloseable {
    static final String STOCK = "stock";
    static final String RECEIVE = "receive";
    static final String RESERVE = "reserve";
    static final String PAY = "pay";
    static final String COMMIT = "commit";
    static final String ROWS = "rows";
    static final String EVENTS = "events";

    private static final int LINGER_MS = 100;
    private static final int BATCH_BYTES = 128 * 1024;
    private static final Duration STOP = Duration.ofSeconds(60);
    private static final long START_S = 120;

    private final KafkaStreams streams;

    Shop(Job job, long commitIntervalMs, Store store, Failure failure) throws InterruptedException {
        streams = new KafkaStreams(topology(job, store), settings(job, commitIntervalMs), new Clients(store));
        CountDownLatch running = new CountDownLatch(1);
        streams.setStateListener((now, before) -> {
            if (now == KafkaStreams.State.RUNNING || now == KafkaStreams.State.ERROR) {
                running.countDown();
            }
        });
        streams.setUncaughtExceptionHandler(cause -> {
            cause.printStackTrace();
            failure.set(cause);
            return StreamThreadExceptionResponse.SHUTDOWN_CLIENT;
        });
        streams.start();
        if (!running.await(START_S, TimeUnit.SECONDS)) {
            throw new IllegalStateException("not running after " + START_S + " s");
        }
    }

    /** From orders, by way of reserve, pay and commit, to rows and events; all of an order in one task. */
    private static Topology topology(Job job, Store store) {
        // Made once, since it is asked for with each event.
        List<Optional<Set<Integer>>> homes =
                IntStream.range(0, job.partitions()).mapToObj(n -> Optional.of(Set.of(n))).toList();
        StreamPartitioner<Object, Event> home = (topic, key, event, partitions) -> homes.get(event.home());
        return new Topology()
                .addSource("deliveries", new StringDeserializer(), Json.read(Delivery.class), job.deliveries())
                .addSource("orders", new StringDeserializer(), Json.read(Order.class), job.orders())
                .addProcessor(RECEIVE, Receive::new, "deliveries")
                .addProcessor(RESERVE, Reserve::new, "orders")
                .addProcessor(PAY, Pay::new, RESERVE)
                .addProcessor(COMMIT, Commit::new, PAY)
                .addProcessor(ROWS, store::processor, RESERVE, COMMIT)
                .addSink(
                        EVENTS, job.events(), new UUIDSerializer(), Json.write(Event.class), home,
                        RESERVE, PAY, COMMIT)
                .addStateStore(
                        Stores.keyValueStoreBuilder(
                                        Stores.persistentKeyValueStore(STOCK), Serdes.String(), Stock.serde())
                                .withCachingEnabled(),
                        RECEIVE, RESERVE, COMMIT);
    }

    private static Properties settings(Job job, long commitIntervalMs) {
        Properties settings = new Properties();
        settings.put(StreamsConfig.APPLICATION_ID_CONFIG, job.applicationId());
        settings.put(StreamsConfig.BOOTSTRAP_SERVERS_CONFIG, job.kafka());
        settings.put(StreamsConfig.PROCESSING_GUARANTEE_CONFIG, job.guarantee());
        settings.put(StreamsConfig.NUM_STREAM_THREADS_CONFIG, job.threads());
        settings.put(StreamsConfig.COMMIT_INTERVAL_MS_CONFIG, commitIntervalMs);
        settings.put(StreamsConfig.STATE_DIR_CONFIG, job.stateDir());
        settings.put(StreamsConfig.consumerPrefix(ConsumerConfig.AUTO_OFFSET_RESET_CONFIG), "earliest");
        settings.put(StreamsConfig.producerPrefix(ProducerConfig.ACKS_CONFIG), "all");
        settings.put(StreamsConfig.producerPrefix(ProducerConfig.LINGER_MS_CONFIG), LINGER_MS);
        settings.put(StreamsConfig.producerPrefix(ProducerConfig.BATCH_SIZE_CONFIG), BATCH_BYTES);
        return settings;
    }

    /** Returns the sums over all products: on hand, reserved, sold. */
    long[] counts() {
        long[] sums = new long[3];
        var stock = streams.store(StoreQueryParameters.fromNameAndType(
                STOCK, QueryableStoreTypes.<String, Stock>keyValueStore()));
        try (var all = stock.all()) {
            all.forEachRemaining(entry -> {
                sums[0] += entry.value.onHand();
                sums[1] += entry.value.reserved();
                sums[2] += entry.value.sold();
            });
        }
        return sums;
    }

    @Override
    public void close() {
        streams.close(STOP);
    }
}
