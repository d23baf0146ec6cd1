/* The direct path, the gate, the copier and the record of one volume, as they are built.

   Two extents of one block each, side by side, so that a discard can touch both.  Sets of blocks
   are bit masks.  Two hosts write; the helper makes barriers; bitmapd copies, settles and drops;
   bitmapd may be killed; barriers may fail; the power may be cut in any state.

   What the names stand for:
     table        which extents V-w sends to the era device (the others go to the gate)
     era, ended   blocks marked in the current era; in ended eras that were not collected
     cur, taken   the gate's dirty blocks: of its current era; to be copied
     copied       on the secondary, perhaps in its cache, and not flushed
     direct, maybe, leaving   bitmapd's knowledge of the table (attach/routes.py): open extents
     wrote, discarded   the counters of the era device; a kernel counts a request when it begins,
                  or, with COUNTED_AT_END, when it ends
     rec          the stored record; a miss waits for it, a drop is taken for durable at once
     primV, primD, secV, secD   content: what reads return, and what outlives a power cut
   Content is a number that every change increases, so two sides are equal if the numbers are.

   Checked in every state, that is wherever the power is cut:
     1. an extent whose primary or secondary may differ, in cache or on the medium, is in `rec`;
     2. when the hosts are gone, the last barrier has landed and nothing is left to copy, primary and
        secondary are equal.

   Left out, each on the side of more behaviour or without influence on the two conditions:
   - A cache that destages by itself: it only makes equal what is unequal.
   - Marks and counts of gated writes in the era device: fewer marks, more skipped barriers.
   - The policy: any recorded extent may be made direct or taken back at any barrier, and any that
     is clean may be dropped at any time.
   Every -DBUG_ is a mistake that must give a counterexample.  -DWITNESS takes the good end, an
   empty record after a kill and a failed barrier, for an error: it must be found, too.

   One step stands for several where nothing that matters can come between: a copy has what the
   primary held when it was read; a flush covers what was written before it began and is over at
   once, which lets extents be dropped sooner than they are; a direct write is sent when it is
   marked, and counted when it is handed over or when it lands. */

#ifndef WRITES
#define WRITES 2      /* of the first host; the second one writes once */
#endif
#ifndef KILLS
#define KILLS 1       /* of bitmapd */
#endif
#ifndef FAILURES
#define FAILURES 1    /* of barriers */
#endif
#ifndef EXTENTS
#define EXTENTS 2     /* with 1 nobody discards */
#endif
#define ALL ((1 << EXTENTS) - 1)

#define BIT(b) (1 << (b))
#define EQUAL(b) (primV[b] == primD[b] && secV[b] == secD[b] && primV[b] == secV[b])

/* Content is compared, never used: so all four may become smaller together. */
#define LOWER(b) \
  do \
  :: primV[b] && primD[b] && secV[b] && secD[b] -> primV[b]--; primD[b]--; secV[b]--; secD[b]-- \
  :: else -> break \
  od

byte primV[2], primD[2], secV[2], secD[2];
unsigned rec : 2, table : 2, era : 2, ended : 2;
unsigned cur : 2, taken : 2, copied : 2;
unsigned direct : 2, maybe : 2, leaving : 2;
unsigned prop : 2;                      /* the table that is proposed or loaded */
bool load;                       /* the barrier under way has a table to load */
bool loaded;                     /* V-w has it as its inactive table */
bool must_load, sealed, closed, suspended, killed;
unsigned adopted : 2;            /* direct when bitmapd was restarted; no barrier landed since */
bool wrote, discarded;           /* the counters have moved since the latest reading */
bool wrote_before, discarded_before;   /* and between that one and the one before */
byte in_flight;                  /* through V-w */
byte gate_in_flight[2];          /* of the gate, by its own eras */
bool gate_era, life;
byte kills, failures, hosts_done;
bool stale; byte stale_table;    /* only with BUG_TWO_HELPERS */

#ifdef BUG_DROP_WHILE_DIRECT
#define OPEN (maybe | leaving)
#elif defined(BUG_DROP_EARLY)
#define OPEN (direct | maybe)
#else
#define OPEN (direct | maybe | leaving)
#endif
#define CLEAN(e) ((rec & BIT(e)) && !((OPEN | cur | taken | copied) & BIT(e)))

proctype Host(byte writes; bool discards) {
  byte b; bool mine, my_era, discard;
  do
  :: writes > 0 ->
     atomic {
       writes--;
       if
       :: b = 0
       :: EXTENTS == 2 -> b = 1
       :: EXTENTS == 2 && discards -> b = 0; discard = 1           /* of both blocks at once */
       fi
     }
send:
     atomic { !suspended ->
       if
       :: table & BIT(b) ->
          /* Marked when dm-era gets to it and then sent on; of a discard the first block alone.
             Where the table splits a discard its parts are like writes. */
          discard = discard && table == 3;
          in_flight++;
#ifndef COUNTED_AT_END
          wrote = 1; discarded = discarded || discard;
#endif
          goto direct_marked
       :: !(table & BIT(b)) && (rec & BIT(b)) ->
          discard = 0;
          in_flight++;
          goto gate_submits
       :: else ->
          discard = 0;
          in_flight++;
          goto miss
       fi
     }
direct_marked:
     era = era | BIT(b);
     atomic {
       primV[b]++;
       if :: discard -> primV[1]++ :: else fi;
#ifdef COUNTED_AT_END
       wrote = 1; discarded = discarded || discard;
#endif
       goto answered
     }
miss:
#ifdef BUG_DATA_BEFORE_RECORD
     primV[b]++;
#endif
     rec = rec | BIT(b);
gate_submits:
     /* Record checked (again, after a miss), block marked, write counted: one event of the gate. */
     atomic {
       if
       :: !(rec & BIT(b)) -> goto miss
       :: else
       fi;
       cur = cur | BIT(b); mine = life; my_era = gate_era; gate_in_flight[my_era]++
     }
     atomic {
       if
       :: mine != life -> goto gate_submits        /* the kernel sends it to the next gate */
       :: else -> primV[b]++; gate_in_flight[my_era]--
       fi
     }
answered:
     atomic { in_flight--; b = 0; discard = 0; mine = 0; my_era = 0 }
  :: else -> break
  od;
  hosts_done++
}

/* bitmapd's loop with the helper's barrier: no copy is in flight while a barrier is under way. */
proctype Loop() {
  bool c, d, d_now, old, last; byte b;
start:
  {
    do
    ::
       /* Gate.take_era and Routes.propose: one event. */
       atomic {
         taken = taken | cur; cur = 0;
         old = gate_era; gate_era = !gate_era;
         last = sealed;
         if
         :: sealed && (direct | maybe) -> load = 1
         :: !sealed ->
            load = 1;
            if :: prop = 0 :: prop = 1 :: ALL & 2 -> prop = 2 :: ALL & 2 -> prop = 3 fi;
#ifndef BUG_UNRECORDED_DIRECT
            prop = prop & rec;
#endif
            maybe = maybe | prop
         :: !sealed && !must_load
         :: sealed && !(direct | maybe)
         fi;
#ifdef BUG_CLEAR_BEFORE_MOVE
         if :: load -> direct = direct & prop :: else fi;
#endif
         if
#ifdef BUG_COUNTERS_OF_ONE_BARRIER
         :: !load && !wrote -> goto landed
#else
         :: !load && !wrote && !wrote_before -> goto landed   /* skipped: three equal readings */
#endif
         :: else
         fi;
         c = wrote; d = discarded; wrote = 0; discarded = 0
       }
       atomic {                                    /* take_metadata_snap rolls the era over */
         ended = ended | era; era = 0;
#ifdef BUG_NO_DRAIN
         if :: load -> table = prop :: else fi;
         d_now = discarded;
         goto passed
#endif
       }
       atomic { suspended = 1; loaded = load }
       atomic {
         if
         :: in_flight == 0 ->
            d_now = discarded;
#ifdef BUG_COUNTERS_READ_LATE
            wrote = 0; discarded = 0;
#endif
            if :: load -> table = prop :: else fi;
            suspended = 0; loaded = 0
         :: failures < FAILURES ->                 /* the deadline: the old table stays */
            failures++; suspended = 0; loaded = 0;
            goto failed
         fi
       }
passed:
       atomic {
         if
         :: failures < FAILURES ->                 /* the helper died before it answered */
            failures++;
            c = 1; d = 1; wrote_before = 1; discarded_before = 1;
            goto failed
         :: true
         fi;
#ifdef BUG_WIDEN_BY_OWN_DISCARDS
         if :: d_now && (ended & 1) -> ended = ended | 2 :: else fi;
#elif defined(BUG_COUNTERS_OF_ONE_BARRIER)
         if :: (d_now || d) && (ended & 1) -> ended = ended | 2 :: else fi;
#elif !defined(BUG_NO_WIDENING)
         if :: (d_now || d || discarded_before) && (ended & 1) -> ended = ended | 2 :: else fi;
#endif
         wrote_before = c; discarded_before = d;
         taken = taken | ended; ended = 0;
landed:
         leaving = 0;
         if
         :: load -> leaving = (direct | maybe) & ~prop; direct = prop; maybe = 0; must_load = 0
         :: else
         fi;
         if :: last -> leaving = 0; closed = 1 :: else fi;
#ifndef BUG_ADOPTED_NOT_TAKEN
         taken = taken | adopted;
#endif
         adopted = 0; goto over
       }
failed:
       atomic {
#ifndef BUG_COUNTERS_AFTER_FAILURE
         wrote = wrote || c; discarded = discarded || d;
#endif
#ifdef BUG_WRONG_ERA
         ended = 0;
#endif
         if
         :: load -> must_load = 1;
#ifdef BUG_FORGETS_MAYBE
            maybe = 0;
#endif
         :: else
         fi
       }
over:
       atomic {
#ifndef BUG_NO_GATE_BARRIER
         gate_in_flight[old] == 0;
#endif
         load = 0; prop = 0; c = 0; d = 0; d_now = 0; old = 0; last = 0;
         if :: !gate_in_flight[gate_era] -> gate_era = 0 :: else fi;
         LOWER(0); LOWER(1)
       }
    :: atomic {
         taken ->
         if
         :: taken & 1 -> b = 0
         :: taken & 2 -> b = 1
         fi;
         secV[b] = primV[b]; taken = taken & ~BIT(b); copied = copied | BIT(b);
         b = 0; LOWER(0); LOWER(1)
       }
    :: atomic { hosts_done == 2 && !sealed -> sealed = 1 }   /* the top device is gone */
    od
  } unless { atomic {
    killed -> killed = 0; c = 0; d = 0; d_now = 0; old = 0; last = 0; b = 0; goto start
  }  }
}

proctype Settler() {
  do
  :: atomic {                                      /* both sides are flushed */
       copied -> copied = 0;
#ifndef BUG_NO_SECONDARY_FLUSH
       secD[0] = secV[0]; secD[1] = secV[1];
#endif
#ifndef BUG_NO_PRIMARY_FLUSH
       primD[0] = primV[0]; primD[1] = primV[1];
#endif
       LOWER(0); LOWER(1)
     }
  :: atomic { CLEAN(0) -> rec = rec & ~1 }
  :: atomic { CLEAN(1) -> rec = rec & ~2 }
  od
}

/* kill -9 of bitmapd; its helper ends too, and leaves nothing suspended.  The next bitmapd has the
   record and the table in force. */
proctype Killer() {
  do
  :: kills < KILLS ->
     atomic {
       kills++; life = !life; killed = 1;
#ifdef BUG_TWO_HELPERS
       if :: loaded -> stale = 1; stale_table = prop :: else fi;
#else
       if
       :: loaded && in_flight == 0 -> table = prop /* resumed with the table that was loaded */
       :: true
       fi;
#endif
       suspended = 0; loaded = 0; load = 0; prop = 0;
       cur = 0; copied = 0; gate_in_flight[0] = 0; gate_in_flight[1] = 0;
       direct = 0; leaving = 0; closed = 0;
#ifdef BUG_RESTART_FORGETS_TABLE
       maybe = 0; must_load = 0; adopted = 0;
#else
       maybe = table; must_load = (table != 0); adopted = table;
#endif
       ended = 0;                                  /* collection begins with the current era */
       /* The next helper knows nothing of the counters. */
       wrote = 1; discarded = 1; wrote_before = 1; discarded_before = 1;
#ifdef BUG_RESTART_COPIES_NOTHING
       taken = 0
#else
       taken = rec
#endif
     }
  :: stale -> atomic { stale = 0; table = stale_table }
  :: else -> break
  od
}

proctype Monitor() {
  atomic {
    (   (!(rec & 1) && !EQUAL(0))
     || (!(rec & 2) && !EQUAL(1))
     || (closed && !(taken | cur) && (primV[0] != secV[0] || primV[1] != secV[1]))
#ifdef WITNESS
     || (closed && !rec && kills == KILLS && failures == FAILURES)
#endif
    ) -> assert(false)
  }
}

init {
  atomic {
    rec = ALL;                                      /* predicted; what is clean may be dropped */
    run Host(WRITES, 0); run Host(1, 1); run Loop(); run Settler(); run Killer(); run Monitor()
  }
}
