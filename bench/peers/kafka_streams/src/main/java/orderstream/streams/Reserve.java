package orderstream.streams;

import java.time.Instant;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.processor.api.RecordMetadata;
import org.apache.kafka.streams.state.KeyValueStore;

/** Reads orders; holds the units, or refuses when they aren't there; writes to pay, or to the rows; publishes. */
final class Reserve extends Stage<Order> {
    private KeyValueStore<String, Stock> stock;

    @Override
    public void init(ProcessorContext<Object, Object> given) {
        super.init(given);
        stock = stock();
    }

    @Override
    public void process(Record<String, Order> record) {
        RecordMetadata place = context.recordMetadata().orElseThrow();
        Sale sale = new Sale(record.value(), place.partition(), place.offset(), Instant.now());
        publish(Event.created(sale), record.timestamp());
        String productId = sale.line().productId();
        int quantity = sale.line().quantity();
        Stock left = stock.get(productId);
        if (left == null || left.available() < quantity) {
            sale.cancelled(left == null ? "unknown_product" : "insufficient_stock", Instant.now());
            publish(Event.cancelled(sale), record.timestamp());
            context.forward(record.withValue(sale), Shop.ROWS);
            return;
        }
        stock.put(productId, left.hold(quantity));
        sale.reserved(left.priceCents(), Instant.now());
        publish(Event.reserved(sale), record.timestamp());
        context.forward(record.withValue(sale), Shop.PAY);
    }
}
