/* The cut word: how the gate knows which requests were begun before a cut by device-mapper.

   Helper: hold, so that new requests wait and those that were begun are answered; word; go on.
   Gate: receive a batch of one or two, then look at the word, then handle it.
   Checked: a request is taken for the new era if and only if it was begun after the go-on.
   Each BUG_ is a mistake that gives a counterexample, WITNESS_NEW a good end that is reached. */

#ifndef REQUESTS
#define REQUESTS 2          /* of each writer */
#endif

bool held, word, gone_on;
byte flying;
chan requests = [4] of { bool };                   /* whether it was begun after the go-on */
chan answers = [4] of { bool };

proctype Writer() {
  byte i;
  bool new;
  do
  :: i < REQUESTS ->
     i++;
     atomic { !held -> flying++; new = gone_on; requests ! new };
     answers ? _
  :: else -> break
  od
}

active proctype Helper() {
  held = 1;
#ifdef BUG_WORD_EARLY
  word = 1;
#endif
  (flying == 0);
#if !defined(BUG_WORD_LATE) && !defined(BUG_WORD_EARLY)
  word = 1;
#endif
  atomic { held = 0; gone_on = 1 }
#ifdef BUG_WORD_LATE
  word = 1
#endif
}

active proctype Gate() {
  bool first, second, two, seen;
  run Writer();
  run Writer();
end:
  do
  ::
#ifdef BUG_LOOKED_FIRST
     seen = word;
#endif
     atomic {
       requests ? first;
       two = 0;
       if
       :: nempty(requests) -> requests ? second; two = 1
       :: skip
       fi
     };
#ifndef BUG_LOOKED_FIRST
     seen = word;
#endif
#ifdef WITNESS_NEW
     assert(!seen);
#endif
     assert(seen == first);
     assert(!two || seen == second);
     atomic { flying--; answers ! 1 };
     if
     :: two -> atomic { flying--; answers ! 1 }
     :: else
     fi
  od
}
