package orderstream.streams;

import com.fasterxml.jackson.core.JsonProcessingException;
import com.fasterxml.jackson.databind.ObjectMapper;
import com.fasterxml.jackson.databind.ObjectReader;
import com.fasterxml.jackson.databind.ObjectWriter;
import com.fasterxml.jackson.databind.PropertyNamingStrategies;
import com.fasterxml.jackson.databind.json.JsonMapper;
import java.io.IOException;
import org.apache.kafka.common.errors.SerializationException;
import org.apache.kafka.common.serialization.Deserializer;
import org.apache.kafka.common.serialization.Serializer;

/** Jackson, with a reader or writer a type made once. */
final class Json {
    static final ObjectMapper MAPPER =
            JsonMapper.builder().propertyNamingStrategy(PropertyNamingStrategies.SNAKE_CASE).build();

    private Json() {}

    static <T> Deserializer<T> read(Class<T> type) {
        ObjectReader reader = MAPPER.readerFor(type);
        return (topic, bytes) -> {
            try {
                return reader.readValue(bytes);
            } catch (IOException e) {
                throw new SerializationException("a record of " + topic + " is no " + type.getSimpleName(), e);
            }
        };
    }

    static <T> Serializer<T> write(Class<T> type) {
        ObjectWriter writer = MAPPER.writerFor(type);
        return (topic, value) -> {
            try {
                return writer.writeValueAsBytes(value);
            } catch (JsonProcessingException e) {
                throw new SerializationException("a record for " + topic + " can't be written", e);
            }
        };
    }
}
