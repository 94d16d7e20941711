package orderstream.streams;

/** What ended a stream thread, or the commands; nothing is tried again. */
final class Failure {
    private volatile Throwable cause;

    void set(Throwable found) {
        cause = found;
    }

    void check() {
        if (cause != null) {
            throw new IllegalStateException("nothing more can be sold", cause);
        }
    }
}
