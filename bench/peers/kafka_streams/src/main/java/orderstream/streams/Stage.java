package orderstream.streams;

import java.util.UUID;
import org.apache.kafka.streams.processor.api.Processor;
import org.apache.kafka.streams.processor.api.ProcessorContext;
import org.apache.kafka.streams.processor.api.Record;
import org.apache.kafka.streams.state.KeyValueStore;

/** A stage: hands sales to the next one, publishes events, and shares the store of stock. */
abstract class Stage<V> implements Processor<String, V, Object, Object> {
    protected ProcessorContext<Object, Object> context;

    @Override
    public void init(ProcessorContext<Object, Object> given) {
        context = given;
    }

    protected KeyValueStore<String, Stock> stock() {
        return context.getStateStore(Shop.STOCK);
    }

    protected void publish(Event event, long timestamp) {
        context.forward(new Record<UUID, Event>(event.orderId(), event, timestamp), Shop.EVENTS);
    }
}
