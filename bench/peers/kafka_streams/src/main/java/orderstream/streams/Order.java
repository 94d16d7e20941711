package orderstream.streams;

import java.util.List;
import java.util.UUID;

/** An order as it stands on the topic {@code orders}. */
record Order(
        UUID orderId,
        String userId,
        List<Line> items,
        String paymentMethod,
        String idempotencyKey,
        String placedAt) {

    /** So many units of one product. */
    record Line(String productId, int quantity) {}
}
