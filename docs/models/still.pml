/* A cut of a volume that hosts write past the gate.

   One host writes n to block A, and when that is answered n to block B; so at every instant
   B <= A <= B + 1.  The kernel marks a write in its era before it lands.  A barrier takes the marks
   of the era that ends, then holds writes until none is in flight, and swaps the table.  The first
   one moves both blocks to the gate, the second brings what was marked until the first one's drain
   had ended.  Then the gate cuts: what is marked is pending, a write to it waits for the read, and
   a block is direct again only when it was read: at a barrier, or when the table grows, which holds
   writes, too, and ends no era.

   Checked: every point is the content of one instant.  Each BUG_ is a mistake that gives a
   counterexample, WITNESS_POINTS a good end that is reached. */

#ifndef WRITES
#define WRITES 3
#endif
#ifndef POINTS
#define POINTS 2
#endif

bool held, reading, direct[2] = 1, marked[2], dirty[2], pending[2];
byte flying, submitted, era, cut, on_disk[2], image[2];
byte old;                                           /* in flight, of before the cut */

inline mark(block) {                                /* the kernel, in the era that is current */
  marked[block] = 1
}

inline write(block, number) {
  atomic { !held -> flying++; past = direct[block] }
  if
  :: past -> mark(block)
  :: else ->                                        /* the gate marks, too, and submits */
     atomic {
#ifdef BUG_NO_CBW
       true ->
#else
       !pending[block] ->
#endif
       dirty[block] = 1; marked[block] = 1; submitted++; mine = era
     }
  fi;
  atomic {
    on_disk[block] = number; flying--;
    if
    :: past
    :: else ->
       submitted--;
       if
       :: mine < era && old -> old--
       :: else
       fi
    fi
  }
}

active proctype Host() {
  byte n = 1;
  bool past;
  byte mine;
  do
  :: n <= WRITES -> write(0, n); write(1, n); n++
  :: else -> break
  od
}

inline fetch(block) {
  atomic {
    if
    :: pending[block] -> image[block] = on_disk[block]; pending[block] = 0
    :: else
    fi
  }
}

/* Ends the kernel's era; what it had is dirty, or pending, when no write of it is in flight. */
inline barrier(as_pending, swap, a, b) {
  atomic { took[0] = marked[0]; took[1] = marked[1]; marked[0] = 0; marked[1] = 0 }
  held = 1;
  do
  :: flying == 0 -> break
  :: reading && pending[0] -> fetch(0)
  :: reading && pending[1] -> fetch(1)
  od;
  atomic {
    if
    :: swap -> direct[0] = a; direct[1] = b
    :: else
    fi;
    held = 0
  }
  atomic {
    if
    :: as_pending -> pending[0] = pending[0] || took[0]; pending[1] = pending[1] || took[1]
    :: else -> dirty[0] = dirty[0] || took[0]; dirty[1] = dirty[1] || took[1]
    fi;
    took[0] = 0; took[1] = 0
  }
}

inline grow(a, b) {
  held = 1;
  do
  :: flying == 0 -> break
  :: reading && pending[0] -> fetch(0)
  :: reading && pending[1] -> fetch(1)
  od;
  atomic { direct[0] = direct[0] || (a); direct[1] = direct[1] || (b); held = 0 }
}

active proctype Gate() {
  bool took[2];
  do
  :: cut < POINTS ->
#ifndef BUG_DIRECT
     barrier(0, 1, 0, 0);
#ifndef BUG_ONE_BARRIER
     barrier(0, 0, 0, 0);
#endif
#else
     barrier(0, 0, 0, 0);
#endif
     atomic {                                       /* the cut */
       pending[0] = dirty[0]; pending[1] = dirty[1]; dirty[0] = 0; dirty[1] = 0;
       old = submitted; era++
     }
     (old == 0);
     reading = 1;
     fetch(0);
#ifdef BUG_LATER_PENDING
     barrier(1, 1, !pending[0], !pending[1]);
#else
#ifdef BUG_PENDING_DIRECT
     barrier(0, 1, 1, 1);
#else
     if
     :: barrier(0, 1, !pending[0], !pending[1])
#ifdef BUG_GROW_PENDING
     :: grow(1, 1)
#else
     :: grow(!pending[0], !pending[1])
#endif
     fi;
#endif
#endif
     fetch(0);
     fetch(1);
     reading = 0;
     cut++;
     assert(image[1] <= image[0] && image[0] <= image[1] + 1);
#ifdef WITNESS_POINTS
     assert(!(cut == POINTS && image[0] == WRITES && image[1] + 1 == image[0]));
#endif
     if
     :: barrier(0, 1, 1, 1)
     :: grow(1, 1)
     fi
  :: else -> break
  od
}
