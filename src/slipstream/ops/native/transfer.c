// What a thread does to bring blocks of files onto a card, as a list. Here it never asks for the interpreter's lock, for
// which it would stand in line behind the other readers several times a block.

#include <errno.h>
#include <stddef.h>
#include <unistd.h>

enum { READ, COPY, RECORD, WAIT };

typedef int (*copy_call)(unsigned long long to, const void *from, size_t nbytes, void *stream);
typedef int (*record_call)(void *event, void *stream);
typedef int (*wait_call)(void *event);

typedef struct {
  copy_call copy;
  record_call record;
  wait_call wait;
  void *stream;
  void *events[2];
} Card;

typedef struct {
  long kind;
  long what;    // READ: a file descriptor; COPY: an address on the card; RECORD, WAIT: the number of an event
  long offset;  // READ: in the file
  long place;   // READ, COPY: in the buffer
  long nbytes;
} Step;

static int read_all(const Step *s, char *to) {
  for (long done = 0; done < s->nbytes;) {
    const ssize_t got = pread((int)s->what, to + done, s->nbytes - done, s->offset + done);
    if (got <= 0 && !(got < 0 && errno == EINTR)) return -1;
    if (got > 0) done += got;
  }
  return 0;
}

// How many of the steps were done: all, or those before the first that failed.
long slipstream_transfer(const Step *steps, long count, char *buffer, const Card *card) {
  for (long i = 0; i < count; i++) {
    const Step *s = steps + i;
    int code = 0;
    switch (s->kind) {
      case READ: code = read_all(s, buffer + s->place); break;
      case COPY: code = card->copy((unsigned long long)s->what, buffer + s->place, s->nbytes, card->stream); break;
      case RECORD: code = card->record(card->events[s->what], card->stream); break;
      case WAIT: code = card->wait(card->events[s->what]); break;
    }
    if (code) return i;
  }
  return count;
}
